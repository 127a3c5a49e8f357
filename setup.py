"""Packages by name, and stg_kernels._C where a compiler and torch are there. The rest is in pyproject.toml.

STG_NATIVE=0 leaves _C out. Why it was not built is printed (`pip install -v`) and does not stop the installation.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# kernels/ is a container without __init__.py: Hugging Face owns the import name `kernels`, ours is `stg_kernels`.
kernels = find_packages("kernels") if Path("kernels").is_dir() else []

TORCH = (2, 11)  # the oldest torch that the binding runs with, whichever it is built with: the stable ABI's promise


def why_not():
    """Why there is nothing to try; None if there is."""
    if os.environ.get("STG_NATIVE") == "0":
        return "STG_NATIVE=0"
    if os.name == "nt":
        return "csrc needs gcc or clang"
    try:
        found = version("torch")
    except PackageNotFoundError:
        return "torch is not in the build environment: pip install --no-build-isolation"
    if tuple(map(int, found.split(".")[:2])) < TORCH:
        return f"torch {found} is older than {'.'.join(map(str, TORCH))}"
    return None


def say(text):
    print(f"stg_kernels._C: {text}", file=sys.stderr, flush=True)


class BuildNative(build_ext):
    """The C++ part by setuptools, the CUDA part by nvcc where there is one that matches torch's CUDA."""

    def run(self):
        for extension in self.extensions:  # a build that fails must not leave the last one behind
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, extension):
        try:
            self._add_torch(extension)
            super().build_extension(extension)
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split())
            say(f"not built: {text if len(text) < 200 else f'{text[:80]} ... {text[-80:]}'}")

    def _add_torch(self, extension):
        import torch
        from torch.utils.cpp_extension import include_paths

        extension.include_dirs += include_paths()
        extension.library_dirs.append(str(Path(torch.__file__).parent / "lib"))
        extension.libraries.append("torch_cpu")
        reason = why_no_cuda(torch)
        if reason:
            say(f"for the CPU only: {reason}")
            return
        nvcc = find_nvcc()
        folder = Path(self.build_temp) / "csrc" / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        for source in sorted(Path("csrc/cuda").glob("*.cu")):
            target = folder / f"{source.stem}.o"
            self.spawn([nvcc, *nvcc_flags(nvcc), "-c", str(source), "-o", str(target)])
            extension.extra_objects.append(str(target))
        extension.define_macros += [("STG_CUDA", None), ("USE_CUDA", None)]  # the second one is torch's
        extension.library_dirs.append(f"{toolkit_of(nvcc)}/lib64")
        extension.libraries += ["torch_cuda", "cudart"]


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def why_no_cuda(torch):
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    nvcc = find_nvcc()
    if nvcc is None:
        return "there is no nvcc"
    found = re.search(r"release (\d+)\.", subprocess.check_output([nvcc, "--version"], text=True)).group(1)
    if found != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {found}, torch of {torch.version.cuda}"
    return None


def toolkit_of(nvcc):
    """Asked of nvcc itself, which may be a script that calls another one."""
    plan = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True)
    return re.search(r"TOP=(.+)", plan.stderr).group(1).strip()


def nvcc_flags(nvcc):
    """Code for the architectures that this nvcc knows, all from one PTX, which serves later ones too."""
    known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    codes = ",".join([code for code in ("sm_80", "sm_90", "sm_100") if code in known] + ["compute_80"])
    generate = f"-gencode=arch=compute_80,code=[{codes}]"
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Icsrc/include", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    return [*flags, generate]


flags = ["-std=c++17", "-O3", "-g0", "-fopenmp-simd", "-fvisibility=hidden"]
flags += ["-fno-fast-math", "-ffp-contract=off"]  # the same bits with and without vectors, whatever their width
if platform.machine() in ("x86_64", "AMD64"):
    flags.append("-march=x86-64-v2")  # the least that is needed; wider vectors are chosen at run time

native = Extension(
    "stg_kernels._C",
    [*map(str, sorted(Path("csrc").glob("*.cpp"))), *map(str, sorted(Path("csrc/cpu").glob("*.cpp")))],
    depends=[str(path) for path in sorted(Path("csrc").rglob("*")) if path.suffix in (".h", ".cuh", ".cu")],
    include_dirs=["csrc/include"],
    define_macros=[("TORCH_TARGET_VERSION", f"0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000")],
    extra_compile_args=flags,
    language="c++",
    py_limited_api=True,
    optional=True,
)

reason = why_not()
if reason and not {"egg_info", "dist_info"}.intersection(sys.argv):
    say(f"not built: {reason}")

setup(
    packages=find_packages(include=["stg_engine", "stg_engine.*"]) + kernels,
    package_dir={name: "kernels/" + name.replace(".", "/") for name in kernels},
    package_data={"stg_engine": ["py.typed", "demo/*.md", "demo/model/**/*"], "stg_kernels": ["py.typed"]},
    ext_modules=[] if reason else [native],
    cmdclass={"build_ext": BuildNative},
    options={} if reason else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
