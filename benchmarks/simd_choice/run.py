"""Build the SIMD variants with g++ (and clang++ when there), check them, time them.

    python run.py [--rounds 300] [--ulp-step 31] [--cxx g++] [--highway PREFIX]

Prints a table and writes results.json: ns per pixel (median and 10th percentile over rounds), the
median over rounds of each variant's time over that of plain loops at the same instruction set, and
the largest error of exp and log in ulp. Highway and ATen are left out when not found.
"""

import argparse
import datetime
import importlib.util
import json
import pathlib
import platform
import shutil
import subprocess
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra"]
ROW = (
    "{variant:13} {isa:10} C={classes:<4} stride {stride} {ns_per_pixel:9.2f} ns/pixel"
    " {ratio_to_loops:6.2f}x loops"
)
ATEN_FLAGS = ["-mavx2", "-mfma", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-w"]


def compile_object(cxx, source, out, extra=(), standard="c++17"):
    command = [cxx, f"-std={standard}", *FLAGS, f"-I{HERE}", *extra, "-c", str(HERE / source)]
    subprocess.run([*command, "-o", str(out)], check=True)
    return str(out)


def aten_include():
    spec = importlib.util.find_spec("torch")
    return pathlib.Path(spec.origin).parent / "include" if spec else None


def highway_paths(prefix):
    """Include and library folders of an installed Highway, or None."""
    if not (prefix / "include/hwy/highway.h").exists():
        return None
    library = next(iter(prefix.glob("lib/**/libhwy.so")), None)
    return (prefix / "include", library.parent) if library else None


def build(cxx, work, highway):
    objects, defines, link = [], [], []
    for source in ("loops_clones.cpp", "loops_pragma.cpp", "vector.cpp", "pair.cpp"):
        objects.append(compile_object(cxx, source, work / f"{source}.o"))
    if highway:
        include, library = highway
        extra = [f"-I{include}", "-w"]
        objects.append(compile_object(cxx, "highway.cpp", work / "highway.o", extra))
        defines.append("-DWITH_HIGHWAY")
        link += [f"-L{library}", "-lhwy", f"-Wl,-rpath,{library}"]
    if include := aten_include():
        extra = [*ATEN_FLAGS, f"-I{include}"]
        objects.append(compile_object(cxx, "aten.cpp", work / "aten.o", extra, "c++20"))
        defines.append("-DWITH_ATEN")
    objects.append(compile_object("g++", "bench.cpp", work / "bench.o", defines))
    subprocess.run(["g++", *objects, "-o", str(work / "bench"), *link], check=True)
    accuracy = compile_object("g++", "accuracy.cpp", work / "accuracy.o")
    command = ["g++", accuracy, str(work / "pair.cpp.o"), "-o", str(work / "accuracy")]
    subprocess.run(command, check=True)


def lines_of(command):
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.split() for line in text.splitlines()]


def measure(cxx, args):
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        build(cxx, work, highway_paths(args.highway))
        keys = ("variant", "isa", "classes", "stride", "ns_per_pixel", "ns_p10", "ratio_to_loops")
        rows = lines_of([str(work / "bench"), str(args.rounds)])
        times = [dict(zip(keys, row, strict=True)) for row in rows]
        for row in times:
            row.update({k: int(row[k]) for k in ("classes", "stride")})
            row.update({k: float(row[k]) for k in keys[4:]})
        ulp = [
            {"function": f, "isa": isa, "max_ulp_vector": float(v), "max_ulp_scalar": float(s)}
            for f, isa, v, s in lines_of([str(work / "accuracy"), str(args.ulp_step)])
        ]
    version = lines_of([cxx, "--version"])[0]
    return {"compiler": " ".join(version), "times": times, "accuracy": ulp}


def cpu_model():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "cpu family", "model\t")):
            yield " ".join(line.split())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--ulp-step", type=int, default=31, help="test every n-th float")
    parser.add_argument("--cxx", nargs="+", default=["g++", "clang++-14"])
    parser.add_argument("--highway", type=pathlib.Path, default=pathlib.Path("/usr"))
    args = parser.parse_args()
    results = {
        "date": datetime.date.today().isoformat(),
        "cpu": sorted(set(cpu_model())),
        "system": platform.platform(),
        "flags": FLAGS,
        "runs": [measure(cxx, args) for cxx in args.cxx if shutil.which(cxx)],
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for run in results["runs"]:
        print(run["compiler"])
        for row in run["times"]:
            print(ROW.format(**row))
        for row in run["accuracy"]:
            print(row)


if __name__ == "__main__":
    main()
