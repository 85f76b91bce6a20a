"""What a compiler made of a kernel: instructions, registers, spills, shared memory, accesses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

from triton import knobs

_SASS = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?!NOP)[A-Z]"


def figures(compiled: Any) -> dict[str, int]:
    """Of a kernel compiled by Triton, with the bytes of the access that moves most of the data.

    Instructions are counted in the code, on NVIDIA up to what serves a warp that has diverged.
    """
    asm = compiled.asm
    found = _nvidia(asm) if "cubin" in asm else _amd(asm["amdgcn"])
    metadata = compiled.metadata
    return {**found, "shared": metadata.shared, "warps": metadata.num_warps}


def _nvidia(asm: dict[str, Any]) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        report, code = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in (
                [knobs.nvidia.cuobjdump.path, "--dump-resource-usage"],
                [knobs.nvidia.nvdisasm.path, "--print-code"],
            )
        )
    usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", report)}
    widths = {"b8": 1, "b16": 2, "b32": 4, "b64": 8}
    pattern = r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.(b8|b16|b32|b64)\b"
    accesses = [
        (kind, int(count or 1) * widths[width])
        for kind, count, width in re.findall(pattern, asm["ptx"])
    ]
    return {
        "instructions": len(re.findall(_SASS, code.partition("WARPSYNC.COLLECTIVE")[0])),
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        **_usual(accesses),
    }


def _amd(text: str) -> dict[str, int]:
    def value(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    widths = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4}
    pattern = (
        r"(?:global|buffer)_(load|store)_(ubyte|byte|ushort|short|dword)(?:_d16(?:_hi)?)?(?:x(\d))?"
    )
    accesses = [
        ("ld" if kind == "load" else "st", widths[width] * int(count or 1))
        for kind, width, count in re.findall(pattern, text)
    ]
    return {
        "instructions": len(re.findall(r"^\t[a-z]+_\w+", text, re.MULTILINE)),
        "registers": value("vgpr_count"),
        "stack": value("private_segment_fixed_size"),
        **_usual(accesses),
    }


def _usual(accesses: Sequence[tuple[str, int]]) -> dict[str, int]:
    """The width in bytes that moves most of the data, of loads and of stores."""
    moved: dict[str, Counter] = {"ld": Counter(), "st": Counter()}
    for kind, width in accesses:
        moved[kind][width] += width
    return {
        name: max(counts, key=lambda width: (counts[width], width), default=0)
        for name, counts in (("load", moved["ld"]), ("store", moved["st"]))
    }
