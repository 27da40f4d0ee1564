"""Verdicts on what is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from ds_moe_ep.doctor.facts import ApexFacts, DeepSpeedFacts, Facts, TorchFacts, TritonFacts
from ds_moe_ep.doctor.verdicts import Status, Verdict
from ds_moe_ep.records.quantity import gigabytes

_verdict = partial(Verdict, "packages")

OLDEST_PYTHON = (3, 10)
# Releases whose AutoEP and Trainer were run with the DeepSpeed of engine/seams.py.
TESTED: Mapping[str, tuple[str, ...]] = {
    "transformers": ("5.0.0", "5.5.4", "5.15.1", "5.20.2", "5.22.2"),
    "accelerate": ("1.15.0",),
}
DEEPSPEED = "deepspeed>=0.17.6,<0.20"  # what setup.py asks for
AUTOEP_SINCE = "0.19.8"
# Releases of transformers that end AutoEP's conversion; engine/recorders.py mends it.
WITHOUT_NAMES = ("5.23", "5.24")
HELPERS = {"nvidia-ml-py": "the busy fraction of GPUs", "mpi4py": "starting with mpirun"}


def judge_packages(facts: Facts) -> list[Verdict]:
    """One verdict per library."""
    return [
        judge_python(facts.python),
        *judge_torch(facts),
        *judge_deepspeed(facts.deepspeed),
        *judge_hugging_face(facts.versions, has_autoep=not (facts.deepspeed.error or facts.deepspeed.autoep)),
        judge_triton(facts.triton, facts.device == "cuda"),
        judge_apex(facts.apex, facts.device == "cuda"),
        judge_helpers(facts),
    ]


def judge_python(version: tuple[int, int, int]) -> Verdict:
    """This Python against the oldest that the package runs on."""
    found = ".".join(str(part) for part in version)
    if version[:2] < OLDEST_PYTHON:
        return _verdict("Python", "problem", f"{found}: too old", "use Python 3.10 or newer")
    return _verdict("Python", "ok", found)


def judge_torch(facts: Facts) -> Iterator[Verdict]:
    """torch, the devices that it sees, and NCCL."""
    torch, host = facts.torch, facts.host
    if torch.error:
        yield _verdict("torch", "problem", torch.error, "pip install torch (.constraints.txt has the tested release)")
        return
    build = f"CUDA {torch.cuda} build" if torch.cuda else "CPU build"
    yield _verdict("torch", "ok", f"{torch.version}, {build}")
    if torch.devices:
        yield _judge_devices(torch)
        yield from _judge_peer_access(torch)
    elif host.num_gpu_files:
        fix = (
            "compare the driver with torch's CUDA release (nvidia-smi), and look at CUDA_VISIBLE_DEVICES"
            if torch.cuda
            else "install a CUDA build of torch"
        )
        yield _verdict("devices", "warning", f"torch sees none of the {host.num_gpu_files} GPUs in /dev", fix)
    else:
        yield _verdict("devices", "ok", "no GPU: DeepSpeed trains on the CPU, gloo moves the rows")
    if torch.devices and not torch.nccl:
        yield _verdict("NCCL", "problem", "this torch has none", "install torch's CUDA build for Linux, which has it")
    elif torch.nccl:
        yield _verdict("NCCL", "ok", torch.nccl)


def _judge_devices(torch: TorchFacts) -> Verdict:
    kinds = {
        f"{device.name}, {gigabytes(device.memory_bytes, 0)}, capability {'.'.join(map(str, device.capability))}"
        for device in torch.devices
    }
    found = f"{len(torch.devices)} x {'; '.join(sorted(kinds))}"
    if len(kinds) > 1:
        fix = "choose devices of one kind with CUDA_VISIBLE_DEVICES: the slowest rank sets the pace"
        return _verdict("devices", "warning", found, fix)
    if min(device.capability for device in torch.devices) < (8, 0):
        return _verdict("devices", "note", f"{found}: no bf16 in hardware", "use fp16")
    return _verdict("devices", "ok", found)


def _judge_peer_access(torch: TorchFacts) -> Iterator[Verdict]:
    if torch.apart:
        pairs = ", ".join(f"{i}-{j}" for i, j in torch.apart[:6]) + (", ..." if len(torch.apart) > 6 else "")
        found = f"GPUs {pairs} cannot reach each other's memory: their rows go through the host's"
        yield _verdict("peer access", "note", found, "nvidia-smi topo -m shows what joins them")


def judge_deepspeed(deepspeed: DeepSpeedFacts) -> Iterator[Verdict]:
    """DeepSpeed against the tested releases, the private names that we use, and AutoEP."""
    if deepspeed.error:
        fix = f"pip install '{DEEPSPEED}'"
        yield _verdict("DeepSpeed", "problem", deepspeed.error, fix)
        return
    tested = ", ".join(deepspeed.tested)
    if deepspeed.seams:
        yield _verdict("DeepSpeed", "problem", deepspeed.seams, f"pip install deepspeed=={deepspeed.tested[-1]}")
    elif deepspeed.version not in deepspeed.tested:
        found = f"{deepspeed.version}: has every name that is used, but was not tested (tested: {tested})"
        yield _verdict("DeepSpeed", "warning", found, f"pip install deepspeed=={deepspeed.tested[-1]}")
    else:
        yield _verdict("DeepSpeed", "ok", f"{deepspeed.version}, tested")
    if deepspeed.autoep:
        found = f"its layer cannot be imported: {deepspeed.autoep}"
        fix = f"only Hugging Face models need it; pip install 'deepspeed>={AUTOEP_SINCE}' for them"
        yield _verdict("AutoEP", "note", found, fix)
    else:
        yield _verdict("AutoEP", "ok", "its layer can be imported")


def judge_hugging_face(
    versions: Mapping[str, str | None], tested: Mapping[str, tuple[str, ...]] = TESTED, has_autoep: bool = True
) -> Iterator[Verdict]:
    """transformers and accelerate against the tested releases; nobody else's models need them."""
    for name, releases in tested.items():
        version, listed = versions.get(name), ", ".join(releases)
        if version is None:
            wish = f"{name}=={releases[-1]}" if releases else name
            yield _verdict(
                name, "ok", f"not installed; only Hugging Face models need it (pip install {wish})", applies=False
            )
        elif name == "transformers" and has_autoep and version.startswith(WITHOUT_NAMES):
            found = f"{version} breaks AutoEP of DeepSpeed {AUTOEP_SINCE}: its registry of outputs takes no names"
            fix = (
                "start with ds_moe_ep.initialize, or import ds_moe_ep.engine before deepspeed.initialize: both mend "
                f"it; or pip install {name}=={releases[-1]}"
            )
            yield _verdict(name, "problem", found, fix)
        elif version in releases:
            yield _verdict(name, "ok", f"{version}, tested")
        elif releases:
            found = f"{version} was not tested with AutoEP (tested: {listed})"
            yield _verdict(name, "warning", found, f"pip install {name}=={releases[-1]}")
        else:
            yield _verdict(name, "note", f"{version}: no release of it was tested with AutoEP")


def judge_triton(triton: TritonFacts, has_device: bool) -> Verdict:
    """Triton's compiler: the layer's own kernels run as plain torch without it."""
    if not triton.version:
        found = "not installed: kernels run as plain torch (ds-moe-ep[triton] has it)"
        return _verdict("Triton", "ok", found, applies=False)
    if triton.error:
        return _verdict("Triton", "note", f"{triton.version}: {triton.error}", "reinstall the release torch asks for")
    if triton.interpreted:
        found = f"{triton.version}: interpreted (TRITON_INTERPRET=1): right, very slow, and no proof for a device"
        return _verdict("Triton", "warning" if has_device else "note", found, "unset TRITON_INTERPRET to compile")
    if triton.compiled:
        return _verdict("Triton", "ok", f"{triton.version}, compiled a kernel that gave the right result")
    found = f"{triton.version}, imports; {triton.reason}"
    if has_device:
        return _verdict("Triton", "note", found, "install a C compiler and Python's headers, which it compiles with")
    return _verdict("Triton", "ok", found, applies=False)


def judge_apex(apex: ApexFacts, has_device: bool) -> Verdict:
    """Operations that apex offers; another project of that name is told apart."""
    build = "build NVIDIA's from its sources (github.com/NVIDIA/apex, with --cpp_ext --cuda_ext)"
    if not apex.place:
        return _verdict("apex", "ok", "not installed: norms and GELU run as torch's", applies=False)
    name = f"apex {apex.version} in {apex.place}".replace("  ", " ")
    if not apex.offers and not apex.has_normalization:
        found = f"{name} is another project, not NVIDIA's: it has no apex.normalization; torch's operations run"
        return _verdict("apex", "warning", found, f"pip uninstall apex; {build}")
    if not has_device:
        return _verdict("apex", "ok", f"{name}: its kernels are for CUDA alone; torch's operations run", applies=False)
    if not apex.offers:
        return _verdict("apex", "note", f"{name} offers nothing ({apex.reason}); torch's operations run", build)
    status: Status = "note" if apex.reason else "ok"
    rest = f" ({apex.reason})" if apex.reason else ""
    return _verdict("apex", status, f"{name} offers {', '.join(apex.offers)}{rest}", build if rest else "")


def judge_helpers(facts: Facts) -> Verdict:
    """The small packages, and what each is for."""
    missing = [name for name in HELPERS if facts.versions.get(name) is None]
    there = [f"{name} {facts.versions[name]}" for name in HELPERS if name not in missing]
    lost = [f"no {name} ({HELPERS[name]})" for name in missing]
    found = ", ".join([*there, *lost])
    if "nvidia-ml-py" in missing and facts.device == "cuda":
        return _verdict("others", "warning", found, "pip install nvidia-ml-py")
    return _verdict("others", "ok", found)
