import pytest, gzip, numpy as np
from PIL import Image
@pytest.fixture(scope="session")
def sample_images():
    raw=gzip.open("/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz").read()[16:16+784*20]
    return [Image.fromarray(x).convert("RGB") for x in np.frombuffer(raw,np.uint8).reshape(-1,28,28)]
