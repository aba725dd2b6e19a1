"""The results record: one strict schema for every number that the project states.

A record is a flat list of rows. Each says what was measured on which network, with which protocol
and seeds, on how many images, and where; cards, tables and figures are written from it.
"""

import json
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clever_zoo.embedding import Part
from clever_zoo.errors import DataError
from clever_zoo.files import write_atomic
from clever_zoo.spec import problem_lines

RESULTS_FILENAME = "results.json"

Role = Literal["model", "paper", "baseline", "untrained", "pixels"]
Interpolation = Literal["bicubic", "bilinear"]
FeatureRecipe = Literal["last1", "last4_reference", "last4_per_block"]

ROLES: tuple[Role, ...] = get_args(Role)
PARTS: tuple[Part, ...] = ("full", "invariant", "equivariant")


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Environment(_Frozen):
    """Where numbers were computed: this repository's commit, the hardware, the versions.

    `versions` are of the further libraries that had a hand in them.
    """

    commit: str
    device: str
    hardware: str
    torch: str
    python: str
    versions: dict[str, str] = {}


class Network(_Frozen):
    """What was measured.

    Attributes:
        name: Its column in tables, such as "clever-resnet18.fmnist" or "untrained".
        role: The model; for one that goes beyond the paper, that of the paper's terms alone; its
            DINO baseline, cut at the same index; the untrained network of the same seed; or the
            raw pixels.
        sha256: Of its weights as they are stored for release; None for pixels, and where the
            record is older than this field.
        training: Facts of its training.
    """

    name: str
    role: Role
    sha256: str | None = None
    training: dict[str, Any] = {}


class Protocol(_Frozen):
    """How a number was measured.

    Attributes:
        task: What was done with the features; `Record.tasks` holds its definition.
        features: "last1": the encoder's output. "last4_reference": class tokens of a ViT's last
            four blocks side by side, only the last of them cut, as the authors' evaluation does.
            "last4_per_block": the same, each of the four cut.
        perturbation: What was done to the test images; see `Record.perturbations`.
        interpolation: Of the resize before the centre crop of the test images.
    """

    task: str
    features: FeatureRecipe = "last1"
    perturbation: str = "ori"
    interpolation: Interpolation = "bicubic"


class Result(_Frozen):
    """One number.

    Attributes:
        network: Name of a network of the record.
        split: Of the data set, whose images were scored.
        protocol: How it was measured.
        part: Which part of the features.
        metric: What the number is, with its unit as a suffix where it has one: "top1" and "top5"
            in percent, "r2" (1 is perfect), "mae_deg".
        at: The point of a curve or the value of k; None where there is none.
        seeds: Random seeds behind the mean; empty where nothing is random.
        mean, std: Over the seeds; the population's standard deviation, 0 for one value.
        n: Images that were scored, or whatever the task says it counts.
        seconds: What it took.
        environment: Index into the record's environments.
    """

    network: str
    split: str = "test"
    protocol: Protocol
    part: Part
    metric: str
    at: float | None = None
    seeds: tuple[int, ...] = ()
    mean: float
    std: float = Field(0.0, ge=0)
    n: int = Field(ge=1)
    seconds: float = Field(0.0, ge=0)
    environment: int = Field(0, ge=0)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this number from every other one of a record."""
        p = self.protocol
        return (
            *(self.network, self.split, p.task, p.features, p.perturbation, p.interpolation),
            *(self.part, self.metric, self.at),
        )


class Record(_Frozen):
    """All numbers of one model and its controls on one data set.

    Attributes:
        model: Full name of the model.
        dataset: What it was measured on.
        invariant_dim: Index at which its features, and those of the controls, are cut.
        images: Number of images in each split.
        digests: What names the data of each split, see `digest` of training/data; empty where the
            record is older than this field.
        tasks, perturbations: Definitions of what the protocols name.
        networks, environments, results: See their classes.
    """

    schema_version: Literal[1] = 1
    model: str
    dataset: str
    invariant_dim: int
    images: dict[str, int]
    digests: dict[str, str] = {}
    tasks: dict[str, str]
    perturbations: dict[str, str]
    networks: tuple[Network, ...]
    environments: tuple[Environment, ...]
    results: tuple[Result, ...]

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        problems = []
        names = [network.name for network in self.networks]
        if len(set(names)) != len(names):
            problems.append(f"networks: {', '.join(names)} are not all different")
        roles = [network.role for network in self.networks]
        if len(set(roles)) != len(roles):
            problems.append(f"networks: {', '.join(roles)} are not all of different roles")
        keys = set()
        for row in self.results:
            where = f"result {row.key}"
            if row.key in keys:
                problems.append(f"{where}: stands twice")
            keys.add(row.key)
            if row.network not in names:
                problems.append(f"{where}: no such network; there are {', '.join(names)}")
            if row.environment >= len(self.environments):
                problems.append(f"{where}: no environment {row.environment}")
            if row.protocol.task not in self.tasks:
                problems.append(f"{where}: task {row.protocol.task!r} is not defined")
            if row.protocol.perturbation not in self.perturbations:
                problems.append(
                    f"{where}: perturbation {row.protocol.perturbation!r} is not defined"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def network(self, role: Role) -> Network | None:
        """The network of that role, None if the record has none."""
        return next((n for n in self.networks if n.role == role), None)

    def find(
        self,
        network: str,
        task: str,
        metric: str,
        part: Part,
        *,
        perturbation: str = "ori",
        interpolation: Interpolation = "bicubic",
        features: str = "last1",
        at: float | None = None,
    ) -> Result | None:
        """The one number of that key, None if it was not measured."""
        key = (network, "test", task, features, perturbation, interpolation, part, metric, at)
        return next((row for row in self.results if row.key == key), None)

    def updated(self, newer: "Record") -> "Record":
        """This record with the rows of a newer one over its own.

        Rows that no longer mean what they say are dropped: those of a network whose weights
        changed or whose role another one took, and those of a task or perturbation that is
        defined otherwise now.

        Raises:
            DataError: If the records are of different models, data or cuts.
        """
        for key in ("model", "dataset", "invariant_dim", "images"):
            if getattr(self, key) != getattr(newer, key):
                raise DataError(
                    f"the record's {key} is {getattr(self, key)!r}, the new one's "
                    f"{getattr(newer, key)!r}; write to another file"
                )
        for split in self.digests.keys() & newer.digests.keys():
            if self.digests[split] != newer.digests[split]:
                raise DataError(
                    f"the record's {split} images are others ({self.digests[split][:12]}...) than "
                    f"the new one's ({newer.digests[split][:12]}...); write to another file"
                )
        networks = self._networks_beside(newer)
        valid = {n.name for n in self.networks if networks.get(n.name, n).sha256 == n.sha256}
        valid &= networks.keys()
        tasks = _unchanged(self.tasks, newer.tasks)
        perturbations = _unchanged(self.perturbations, newer.perturbations)
        environments = list(dict.fromkeys([*self._environments(), *newer._environments()]))
        rows = {
            row.key: (row, record)
            for record in (self, newer)
            for row in record.results
            if record is newer
            or (
                row.network in valid
                and row.protocol.task in tasks
                and row.protocol.perturbation in perturbations
            )
        }
        places = {
            key: environments.index(record._environments()[row.environment])
            for key, (row, record) in rows.items()
        }
        used = sorted(set(places.values()))
        return Record(
            model=self.model,
            dataset=self.dataset,
            invariant_dim=self.invariant_dim,
            images=self.images,
            digests=self.digests | newer.digests,
            tasks=tasks | newer.tasks,
            perturbations=perturbations | newer.perturbations,
            networks=tuple(sorted(networks.values(), key=lambda n: ROLES.index(n.role))),
            environments=tuple(Environment.model_validate_json(environments[i]) for i in used),
            results=tuple(
                row.model_copy(update={"environment": used.index(places[key])})
                for key, (row, _) in rows.items()
            ),
        )

    def _networks_beside(self, newer: "Record") -> dict[str, Network]:
        taken = {n.role for n in newer.networks}
        ours = {n.name: n for n in self.networks}
        networks = {n.name: n for n in self.networks if n.role not in taken}
        for n in newer.networks:  # a released name brings no facts of its training
            old = ours.get(n.name)
            known = old.training if old is not None and old.sha256 == n.sha256 else {}
            networks[n.name] = n.model_copy(update={"training": n.training or known})
        return networks

    def _environments(self) -> list[str]:
        return [environment.model_dump_json() for environment in self.environments]

    def to_json(self) -> bytes:
        """The content of results.json: one row a line, fields at their defaults left out."""
        content = self.model_dump(mode="json", exclude={"results"})
        rows = [r.model_dump(mode="json", exclude_defaults=True) for r in self.results]
        head = json.dumps(content, indent=1)[:-2]
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        return f'{head},\n "results": [\n  {lines}\n ]\n}}\n'.encode()

    def write(self, path: Path) -> None:
        """Write results.json in one step."""
        write_atomic(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read a results.json strictly.

        Raises:
            DataError: If it is missing or does not fit, with all mistakes.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise DataError(
                f"{path} does not exist; write it with python -m training.evaluate"
            ) from error
        except ValidationError as error:
            lines = "".join(f"\n  - {line}" for line in problem_lines(error))
            raise DataError(f"{path} is no results record:{lines}") from error


def _unchanged(old: dict[str, str], new: dict[str, str]) -> dict[str, str]:
    """Definitions that the newer record does not give another text."""
    return {name: text for name, text in old.items() if new.get(name, text) == text}
