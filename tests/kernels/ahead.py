"""Compiling a kernel ahead of time for a device that is not there, and what its machine code takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MachineCode:
    """Needs of one kernel on one kind of device."""

    num_registers: int  # per thread
    num_local_bytes: int  # per thread, of spilled registers; 0 is none
    num_global_loads: int
    num_wide_loads: int  # of 128 bits
    num_wide_stores: int
    narrow_products: tuple[
        str, ...
    ]  # of two numbers that only a call knows, in 32 bits: an offset may overflow in them


def compile_ahead(
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    num_warps: int = 4,
    divisor: int = 16,
) -> MachineCode:
    """The machine code of a kernel; `arguments` maps names to Triton's types, all of them multiples of the divisor."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    divisible = {(names.index(name),): [["tt.divisibility", divisor]] for name in arguments}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = told(tools / "cuobjdump", "-res-usage", file.name)
        lines = told(tools / "nvdisasm", "-c", file.name).splitlines()
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    loads = [line for line in lines if re.search(r"\b(LDG|LDGSTS)\b", line)]
    stores = [line for line in lines if re.search(r"\bSTG\b", line)]
    return MachineCode(
        num_registers=registers,
        num_local_bytes=stack + local,
        num_global_loads=len(loads),
        num_wide_loads=sum(".128" in line for line in loads),
        num_wide_stores=sum(".128" in line for line in stores),
        narrow_products=tuple(narrow_products(made.asm["ttir"])),
    )


def narrow_products(ttir: str) -> list[str]:
    """Products in 32 bits neither of whose factors is a constant, in Triton's intermediate code."""
    made_by = dict(re.findall(r"^\s*(%[\w-]+) = (.*)$", ttir, re.MULTILINE))

    def is_constant(name: str) -> bool:
        made = made_by.get(name, "")
        if made.startswith(("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi")):
            return is_constant(re.findall(r"%[\w-]+", made)[0])
        return made.startswith("arith.constant")

    products = re.findall(r"arith\.muli (%[\w-]+), (%[\w-]+)\S* : (?:tensor<[\dx]*x)?i32>?", ttir)
    return [f"{one} * {other}" for one, other in products if not is_constant(one) and not is_constant(other)]


def told(*command: Any) -> str:
    """Output of a command."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
