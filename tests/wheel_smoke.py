"""What an installed wheel must do with nothing but its dependencies: run as a script, away from the checkout."""

import sys
from pathlib import Path

import torch
from torch import nn

import fastens
from fastens import proven
from fastens.reference.forest import Trees


def check_installation() -> None:
    package = Path(fastens.__file__).resolve().parent
    assert not (package.parent / "setup.py").exists(), f"{package} is a checkout, not an installed wheel"
    assert fastens.backends()["native"] == "available", fastens.backends()
    assert not list(package.rglob("*.safetensors")), "the demo's weights are a package of their own"
    compiled = [path.name for path in package.rglob("*.so")]
    assert compiled == ["libfastens_cpu.so"], f"{compiled}: modules of one Python are slow on every other"
    assert proven.FILE.is_file(), "a wheel says of which sources the GPU code was read"
    assert set(proven.sources()) >= {"kernels/_conv2d.py", "kernels/_conv2d_tma.py"}
    assert (package / "csrc" / "cpu" / "aggregate.cpp").is_file(), "an installed package can build its library again"


def check_rules() -> None:
    scores = [torch.randn(3, 2, 8, 8) for _ in range(5)]
    for rule in fastens.rules.names()[:-2]:  # not those that draw
        native, reference = (fastens.aggregate(scores, rule, backend=b) for b in ("native", "reference"))
        torch.testing.assert_close(native, reference, rtol=1e-5, atol=1e-5)


def check_ensemble() -> None:
    members = [
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 1, 1)).eval()
        for _ in range(3)
    ]
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        ensemble = fastens.Ensemble(members)
        torch.testing.assert_close(ensemble(x), torch.stack([member(x) for member in members]).mean(0))
    assert ensemble.engine == "fold"


def check_forest() -> None:
    split = {"feature": [0, -1, -1] * 2, "threshold": [0.5, 0, 0, -0.5, 0, 0], "left": [1, 0, 0] * 2}
    split |= {"right": [2, 0, 0] * 2, "default_left": [0] * 6, "values": [[1.0], [2.0], [3.0], [5.0]]}
    forest = fastens.Forest(Trees(offsets=[0, 3, 6], num_features=1, **split))
    x = torch.tensor([[-1.0], [0.0], [1.0]]).numpy()
    assert forest.predict(x, backend="native")[:, 0].tolist() == [2.0, 3.0, 3.5]


if __name__ == "__main__":
    torch.manual_seed(0)
    check_installation()
    check_forest()
    check_rules()
    check_ensemble()
    assert not {"diffusers", "matplotlib", "sklearn"} & set(sys.modules)
    print(f"fastens {fastens.__version__} from its wheel, torch {torch.__version__}: native library, rules, ensemble")
