"""Python compiled to machine code once, kept on disk, and run on torch's own OpenMP threads.

A kernel is a Python function of one address, that of its arguments (int64 and float64 side by side). Numba compiles
it; the object code is kept under `cache_dir()`, by a key made of the kernel's sources, the compilers' versions and the
CPU's name and features, so that another CPU, or a changed kernel, never meets old code. A warm start loads
the object with llvmlite alone: importing Numba would take 0.6 s.

Every kernel runs inside one parallel region of the OpenMP runtime that torch has already started (libgomp, or libomp
under its GNU names): a second pool would fight torch's for the cores, and a region costs a microsecond or two.
`thread(p)`, `num_threads(p)` and `barrier(p)` serve inside. Where torch brings no such runtime, kernels run on one
thread. Numba's own settings NUMBA_CPU_NAME and NUMBA_CPU_FEATURES choose the target CPU here too.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import pathlib
import platform
import re
import struct
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib.metadata import version

import llvmlite.binding as llvm
import torch

KEPT = 4  # objects of a kernel: for other CPUs or environments that share the folder; every change makes a new one
HEADER = 3  # int64 slots before a kernel's own arguments: addresses of the runtime's functions
_lock = threading.RLock()


def cache_dir() -> pathlib.Path:
    """Where compiled kernels are kept: $OCTAVO_CACHE_DIR, or octavo/kernels in the user's cache folder."""
    if "OCTAVO_CACHE_DIR" in os.environ:
        return pathlib.Path(os.environ["OCTAVO_CACHE_DIR"])
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "octavo" / "kernels"


def pack(*arguments: int | float) -> bytes:
    """A kernel's arguments behind the addresses of the thread runtime."""
    fields = "".join("d" if isinstance(a, float) else "q" for a in arguments)
    return struct.pack(f"{HEADER}q{fields}", *_openmp().functions, *arguments)


class Kernel:
    """A kernel by name: loaded from disk, or compiled, at its first call. Safe to call from several threads.

    `build` returns the Python function of one int64 (the arguments' address); it may import Numba. `name` must tell
    apart all that `build` depends on beside the sources.
    """

    def __init__(self, name: str, build: Callable[[], Callable[[int], None]]) -> None:
        self.name, self._build = name, build
        self._address = 0

    def __call__(self, *arguments: int | float, threads: int | None = None) -> None:
        """Runs on `threads` (default: as many as torch uses); ints and floats arrive as int64 and float64."""
        self.run(pack(*arguments), threads or torch.get_num_threads())

    def run(self, packed: bytes, threads: int) -> None:
        """Runs on arguments made by `pack`."""
        _openmp().run(self.address, packed, threads)

    @property
    def address(self) -> int:
        if not self._address:
            with _lock:
                self._address = self._address or _load(self.name, self._build)
        return self._address


class _OpenMP:
    """The OpenMP runtime of this process, through its GNU entry points; one thread where there is none."""

    def __init__(self, path: str | None) -> None:
        self.functions = (0, 0, 0)
        self._parallel = None
        if path is not None:
            library = ctypes.CDLL(path)
            names = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
            thread_num, num_threads, barrier = (ctypes.cast(library[n], ctypes.c_void_p).value or 0 for n in names)
            self.functions = (thread_num, num_threads, barrier)
            self._parallel = library["GOMP_parallel"]
            self._parallel.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint)
            self._parallel.restype = None

    def run(self, address: int, arguments: bytes, threads: int) -> None:
        if self._parallel is not None:
            self._parallel(address, arguments, threads, 0)
        else:
            ctypes.CFUNCTYPE(None, ctypes.c_char_p)(address)(arguments)


@functools.cache
def _openmp() -> _OpenMP:
    return _OpenMP(_openmp_path())


def _openmp_path() -> str | None:
    """The OpenMP library that torch has loaded; opening it again by its path gives the same threads."""
    if sys.platform == "linux":
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "omp" in line}
    else:
        paths = {str(p) for p in (pathlib.Path(torch.__file__).parent / "lib").glob("lib*omp*.dylib")}
    named = sorted(p for p in paths if os.path.basename(p).startswith(("libgomp", "libomp", "libiomp")))
    ours = [p for p in named if f"{os.sep}torch{os.sep}" in p or f"{os.sep}torch.libs{os.sep}" in p]
    return next(iter(ours + named), None)


@functools.cache
def cpu() -> tuple[str, frozenset[str]]:
    """Name and features of the CPU that kernels are compiled for."""
    name = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    wanted = os.environ.get("NUMBA_CPU_FEATURES")
    if wanted is None and "NUMBA_CPU_NAME" in os.environ:
        wanted = ""
    flags = llvm.get_host_cpu_features().flatten() if wanted is None else wanted
    return name, frozenset(f[1:] for f in flags.split(",") if f.startswith("+"))


@functools.cache
def lacks(feature: str) -> bool:
    """True on an x86 CPU without this extension; what others call otherwise is in their base instructions."""
    return platform.machine().lower() in ("x86_64", "amd64") and feature not in cpu()[1]


@functools.cache
def _environment(source: str) -> str:
    """All that compiled code depends on but its name: sources, compilers, CPU."""
    name, features = cpu()
    parts = [
        hashlib.sha256(_sources(source)).hexdigest(),
        version("numba"),
        version("llvmlite"),
        platform.python_version(),
    ]
    return " ".join([*parts, platform.machine(), sys.platform, name, *sorted(features)])


def _sources(path: str) -> bytes:
    """The file at `path` and all files of this folder that it names, at any remove."""
    here, seen, ahead = pathlib.Path(__file__).parent, {}, {pathlib.Path(path), pathlib.Path(__file__)}
    while ahead:
        file = ahead.pop()
        seen[file.name] = file.read_bytes()
        named = re.findall(rb"octavo\.kernels\.cpu\.(\w+)", seen[file.name])
        ahead |= {here / f"{module.decode()}.py" for module in named if f"{module.decode()}.py" not in seen}
    return b"".join(seen[name] for name in sorted(seen))


def _load(name: str, build: Callable[[], Callable[[int], None]]) -> int:
    environment = _environment(build.__code__.co_filename)
    key = hashlib.sha256(f"{name} {environment}".encode()).hexdigest()[:32]
    path = cache_dir() / f"{name}-{key}.o"
    code = _read(path)
    if code is None:
        code = _compile(name, build())
        _write(path, code)
        _prune(path.parent, name)
    return _link(code)


def _read(path: pathlib.Path) -> bytes | None:
    """Object code after the digest that proves it whole; None when absent or damaged."""
    try:
        content = path.read_bytes()
        with contextlib.suppress(OSError):  # a folder that is only read
            os.utime(path)
    except OSError:
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def _write(path: pathlib.Path, code: bytes) -> None:
    """Keeps the code; where the folder cannot be written, the next process compiles again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError as error:
        print(f"octavo: cannot keep compiled kernels in {path.parent}: {error}", file=sys.stderr)


def _prune(folder: pathlib.Path, name: str) -> None:
    """Removes all objects of the kernel but the `KEPT` that were used last."""
    with contextlib.suppress(OSError):  # another process may be doing the same
        objects = sorted(folder.glob(f"{name}-{'?' * 32}.o"), key=lambda p: p.stat().st_mtime)
        for old in objects[:-KEPT]:
            old.unlink()


def _compile(name: str, function: Callable[[int], None]) -> bytes:
    import numba

    print(f"octavo: compiling the CPU kernel {name} (once; kept in {cache_dir()})", file=sys.stderr, flush=True)
    compiled = numba.cfunc("void(int64)", error_model="numpy")(function)
    library = compiled._library
    external = sorted(f.name for f in library._final_module.functions if f.is_declaration and f.name[:5] != "llvm.")
    unknown = [f for f in external if f not in _C_FUNCTIONS and not f.startswith(_ERROR_PATHS)]
    assert not unknown, f"kernel {name} calls {unknown}, which a warm start could not link"
    external += [v.name for v in library._final_module.global_variables if v.is_declaration]
    code: bytes = library._codegen._tm.emit_object(library._final_module)
    header = json.dumps({"symbol": compiled.native_name, "external": external}).encode()
    return len(header).to_bytes(4, "little") + header + code


_C_FUNCTIONS = {"memset": ctypes.memset, "memcpy": ctypes.memmove, "memmove": ctypes.memmove}
_ERROR_PATHS = ("numba_", "NRT_", "Py", "_Py")  # of the wrapper that Numba puts around a kernel
_engines: list[llvm.ExecutionEngine] = []  # own the code: never freed
_no_error_path = ctypes.CFUNCTYPE(None)(os.abort)


def _address_of(name: str) -> int:
    """Where a function or variable lives that compiled code refers to; LLVM finds none of this process by itself."""
    if name in _C_FUNCTIONS:
        return ctypes.cast(_C_FUNCTIONS[name], ctypes.c_void_p).value or 0
    if name.startswith(("Py", "_Py")):
        return ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, name))
    return ctypes.cast(_no_error_path, ctypes.c_void_p).value or 0  # kernels raise nothing


def _link(content: bytes) -> int:
    length = int.from_bytes(content[:4], "little")
    header, code = json.loads(content[4 : 4 + length]), content[4 + length :]
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    for name in header["external"]:  # one that is missing would leave all the others unresolved
        if llvm.address_of_symbol(name) is None:
            llvm.add_symbol(name, _address_of(name))
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(header["symbol"]))
