"""Our HaLoRA step against the same step with aihwkit-lightning's layers.

aihwkit-lightning 2.1.0 (IBM, MIT) trains with noise on the weights too: normal, drawn at every forward, its deviation
relative to the largest weight of the matrix. Its layers stand in the place of ours inside our loop, so that rows,
batches, logits, adapter and optimiser are the same. It asks for another torch than ours; so it is installed without its
dependencies in an environment of its own, on top of this one: both ways run on one torch.

    python -m benchmarks.lightning
"""

import os
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from math import isclose
from pathlib import Path

from benchmarks.harness import interleave, parser, record, save, use_threads
from benchmarks.ways import CLEAN, SIGMA, OurSteps, trial
from halora.selection.lightning import PACKAGE
from halora.settings.trial import TrialConfig
from halora.training.models import extensions_dir
from halora.training.rram import RramLinear
from halora.trial_runner import TrialRunner

_TOLERANCE = 1e-3  # of a loss in fp32, relative; a sum in another order


def main() -> None:
    """Measure and save, in the environment that has the package."""
    arguments = parser(__doc__).parse_args()
    if find_spec("aihwkit_lightning") is None:
        python = str(environment() / "bin" / "python")
        os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir())  # what DeepSpeed built serves there too
        os.execv(python, [python, "-m", "benchmarks.lightning", *sys.argv[1:]])
    use_threads(arguments.threads)
    check_equal_losses()
    records = []
    for dtype in ("bf16", "fp32"):
        settings = {"training.dtype": dtype, "training.batch_size": 16, "training.steps": arguments.rounds + 1}
        ways = {"ours": OurSteps(trial(settings)), "lightning": lightning_steps(trial({**settings, **CLEAN}), SIGMA)}
        seconds = interleave(ways, arguments.rounds)
        for way in ways.values():
            way.close()
        records.append(record(f"lightning/{dtype}, 16 rows", seconds["ours"], seconds["lightning"]))
    save(records, arguments.results)


def lightning_steps(config: TrialConfig, sigma: float) -> OurSteps:
    """Our loop over aihwkit-lightning's layers; the noise is theirs, so the trial is to have none of ours."""
    from aihwkit_lightning.nn import AnalogLinear
    from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig, WeightNoiseInjectionType

    hardware = TorchInferenceRPUConfig()
    hardware.modifier.noise_type = WeightNoiseInjectionType.ADD_NORMAL
    hardware.modifier.std_dev = sigma
    hardware.mapping.max_input_size = -1  # one crossbar per matrix, as in our way
    runner = TrialRunner()
    causal_lm = runner.base(config)[0].causal_lm
    for name, layer in list(causal_lm.named_modules()):
        if isinstance(layer, RramLinear):
            parent, _, child = name.rpartition(".")
            analog = AnalogLinear.from_digital(layer, hardware).requires_grad_(False)
            setattr(causal_lm.get_submodule(parent), child, analog)
    return OurSteps(config, runner)


def check_equal_losses() -> None:
    """Refuse to compare unless both have the same loss on clean weights.

    Raises:
        AssertionError: They have not.
    """
    config = trial({"training.dtype": "fp32", **CLEAN})
    ways = [OurSteps(config), lightning_steps(config, sigma=0.0)]
    for way in ways:
        way()
        way.close()
    (ours,), (other,) = (way.losses for way in ways)
    assert isclose(ours, other, rel_tol=_TOLERANCE), f"losses on clean weights: ours {ours}, lightning {other}"


def environment() -> Path:
    """The environment with the package, below ours, made on first use.

    Raises:
        CalledProcessError: The package cannot be installed.
    """
    folder = Path(sys.prefix) / "benchmarks" / PACKAGE
    ready = folder / "ready"
    if not ready.exists():
        venv.create(folder, clear=True, symlinks=True)
        python = str(folder / "bin" / "python")
        asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
        ours = sysconfig.get_path("purelib")
        (packages / "this-project.pth").write_text(f"import site; site.addsitedir({ours!r})\n", encoding="utf-8")
        install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", PACKAGE]
        subprocess.run([*install, "--quiet", "--disable-pip-version-check"], check=True)
        ready.touch()
    return folder


if __name__ == "__main__":
    main()
