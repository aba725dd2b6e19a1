"""The self-supervised methods, plain or wrapped by CLeVER, one file each."""

from training.methods.barlow_twins import BarlowTwins, BarlowTwinsSection
from training.methods.base import MethodRow
from training.methods.byol import Byol, ByolSection
from training.methods.dino import Dino, DinoSection
from training.methods.mocov3 import MoCoV3, MoCoV3Section
from training.methods.simclr import SimClr, SimClrSection
from training.methods.simsiam import SimSiam, SimSiamSection
from training.methods.vicreg import VicReg, VicRegSection

METHODS = {
    "dino": MethodRow(DinoSection, Dino),
    "simsiam": MethodRow(SimSiamSection, SimSiam),
    "byol": MethodRow(ByolSection, Byol),
    "mocov3": MethodRow(MoCoV3Section, MoCoV3),
    "simclr": MethodRow(SimClrSection, SimClr),
    "barlow_twins": MethodRow(BarlowTwinsSection, BarlowTwins),
    "vicreg": MethodRow(VicRegSection, VicReg),
}
