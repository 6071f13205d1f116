# /// script
# dependencies = ["nox[uv]>=2025.5"]
# ///
"""Every check of the project: ``nox --list`` shows them, ``nox -s NAME`` runs one.

Dependencies are the groups of pyproject.toml. A session installs all that it needs in one go, so
that the pins of a group hold for the whole environment.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv|virtualenv"

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")

RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHONS = list(dict.fromkeys([RUNNING, *nox.project.python_versions(PYPROJECT)]))
nox.options.pythons = [RUNNING]  # `nox --python 3.12` asks for another

# What `pytest --backends` covers where one framework is installed, or all of them.
BACKENDS = {"numpy": "numpy,readonly,strict,dask", "torch": "torch", "jax": "jax", "cupy": "cupy"}
ALL_BACKENDS = f"{BACKENDS['numpy']},torch,jax"
FRAMEWORKS = ("numpy", "torch", "jax")

# A worker for each core, up to eight. A file stays with one: its fixtures are made once.
IN_PARALLEL = ("-n", "auto", "--maxprocesses=8", "--dist", "loadfile")

# What is built around the frameworks: a dependency group, the modules that must be there, and the
# examples of the documentation that need them.
AROUND = {
    "torch": (
        "around-torch",
        "lightning,transformers,accelerate,peft,timm_models,other_packages",
        "--examples=torch",
    ),
    "deepspeed": ("deepspeed", "deepspeed"),
    "keras": ("keras", "keras", "--examples=keras"),
    "thinc": ("thinc", "thinc", "--examples=thinc"),
}
# Of tests/examples; what else is there runs in `agreement`.
EXAMPLES = ("tests/examples/test_documents.py", "tests/examples/test_doctests.py")
PEERS = "flax,haiku,equinox,pytorch_optimizer,matplotlib,scipy,ml_dtypes"

# timm asks for torchvision, of which there is no build for the CPU on PyPI, and runs without.
TIMM = ("timm>=1.0.20", "huggingface_hub", "safetensors", "pyyaml", "pillow")
# Packages whose layers have rules, and what they import, without torch builds of their own choice.
LAYERS = (
    *("torch_geometric", "xxhash", "loralib", "zuko", "nflows", "UMNN", "torchdiffeq", "litgpt"),
    *("open_clip_torch", "ftfy", "wcwidth", "vit-pytorch", "einops", "denoising-diffusion-pytorch"),
    *("ema-pytorch", "speechbrain", "hyperpyyaml", "ruamel.yaml", "joblib", "scipy"),
    *("blitz-bayesian-pytorch", "bayesian-torch", "e3nn", "opt_einsum_fx", "opt_einsum"),
    *("rtdl-num-embeddings", "hyper-connections", "torch-einops-utils", "product-key-memory"),
    *("colt5-attention", "local-attention", "norse", "nir", "nirtorch", "h5py"),
)

# Tests that import every public module whose framework is there.
OF_THE_PACKAGE = ("tests/test_canary.py", "tests/test_public_api.py")

# The extras of the wheel that run anywhere: where their examples are, and what these need besides.
EXTRAS = {
    "numpy": "README",
    "torch": "README",
    "jax": "README flax",
    "keras": "keras jax scikit-learn",
    "thinc": "thinc spacy scikit-learn",
}

# Where XLA compiles longer than the programs run. The flags halve that for many small kernels; JAX
# for newer releases of Python does not know them, and would abort.
IN_HASTE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
IN_GREAT_HASTE = dict(IN_HASTE)
if RUNNING == "3.11":
    IN_GREAT_HASTE["XLA_FLAGS"] = (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )

IS_INSTALLED = "import gcx; assert 'site-packages' in gcx.__file__, gcx.__file__"
COUNT_GPUS = "from gcx import backends; print(len(backends.load('cupy').devices()))"

# uv does not read pip's setting, and would take another build of torch than the one provided.
if "PIP_FIND_LINKS" in os.environ:
    os.environ.setdefault("UV_FIND_LINKS", ",".join(os.environ["PIP_FIND_LINKS"].split()))
os.environ.setdefault("MPLBACKEND", "Agg")


@nox.session(python=PYTHONS)
@nox.parametrize("backend", list(BACKENDS), ids=list(BACKENDS))
def tests(session: nox.Session, backend: str) -> None:
    """Run the tests with one framework installed, and NumPy as the reference."""
    install(session, "-e.", backend, "test" if backend == "numpy" else "core-test")
    is_cupy = backend == "cupy"
    if is_cupy and str(session.run("python", "-c", COUNT_GPUS, silent=True)).strip() == "0":
        session.warn("no GPU here: no CuPy array is computed, only what needs none is tested")
        run_pytest(session, "tests/test_cupy_backend.py", "--backends=numpy")
        return
    if is_cupy:
        run_pytest(session, "tests/examples", "--examples=cupy", "--backends=cupy")
    session.env.setdefault("OMP_NUM_THREADS", "1")
    run_pytest(session, f"--backends={BACKENDS[backend]}", *IN_PARALLEL)


@nox.session(python=RUNNING)
@nox.parametrize("extra", FRAMEWORKS, ids=FRAMEWORKS)
def lowest(session: nox.Session, extra: str) -> None:
    """Run the tests with the oldest releases that an extra allows; needs uv."""
    session.install("--resolution", "lowest-direct", f"-e.[{extra}]")
    install(session, *(("numpy", "test") if extra == "numpy" else ("core-test",)))
    # The oldest torch comes from PyPI, with gigabytes of CUDA libraries.
    run_pytest(session, f"--backends={extra}", *IN_PARALLEL)


@nox.session(python=PYTHONS)
def agreement(session: nox.Session) -> None:
    """Compare the frameworks with each other and with peers; run the examples of the docs."""
    install(session, "-e.", *FRAMEWORKS, "demo", "test", "peers")
    together = (f"--backends={ALL_BACKENDS}", "-m", "not one_framework or peers")
    examples = ("tests/examples", "--examples=agreement")
    run_pytest(session, "tests", *examples, *together, f"--packages={PEERS}")


@nox.session(python=PYTHONS)
@nox.parametrize("around", list(AROUND), ids=list(AROUND))
def integrations(session: nox.Session, around: str) -> None:
    """Run the tests of what is built around a framework: trainers, and packages of layers."""
    group, packages, *examples = AROUND[around]
    session.env["DS_BUILD_OPS"] = "0"  # DeepSpeed is to compile nothing
    install(session, "-e.", group, "core-test")
    if around == "torch":
        session.install("--no-deps", *TIMM, *LAYERS)
    arguments = ["tests/test_canary.py", "tests/adapters", f"tests/around_{around}"]
    arguments += [*EXAMPLES, *examples] if examples else []
    arguments += [f"--packages={packages}", "--backends=numpy"]
    if around != "keras":
        run_pytest(session, *arguments)
        return
    for backend in ("torch", "jax"):
        session.env["KERAS_BACKEND"] = backend
        run_pytest(session, *arguments)


@nox.session(python=RUNNING)
def kernels(session: nox.Session) -> None:
    """Test the GPU kernels without a GPU: emulated on the CPU, and compiled."""
    install(session, "-e.", "kernels")
    session.env.setdefault("OMP_NUM_THREADS", "1")
    options = ("--packages=cupy,cuda.bindings.nvrtc,ml_dtypes", "--backends=numpy,torch")
    run_pytest(session, "tests/test_canary.py", "tests/kernels", *options, *IN_PARALLEL)


@nox.session(python=RUNNING)
def xla_gpu(session: nox.Session) -> None:
    """Compile optimizer steps for a GPU that is not here, and count the bytes that they move."""
    install(session, "-e.", "jax", "core-test")
    ask = "import jaxlib; print(jaxlib.__version__)"
    version = str(session.run("python", "-c", ask, silent=True)).strip()
    session.install("--no-deps", f"jax-cuda13-plugin=={version}", f"jax-cuda13-pjrt=={version}")
    run_pytest(session, "tests/xla_gpu.py", "--backends=jax")


@nox.session(python=RUNNING)
def wheel(session: nox.Session) -> None:
    """Build the distributions into dist/, twice and with equal bits; check what is in them."""
    install(session, "build")
    shutil.rmtree(DIST, ignore_errors=True)
    session.env["SOURCE_DATE_EPOCH"] = "1577836800"
    with TemporaryDirectory() as again:
        for folder in (str(DIST), again):
            session.run("python", "-m", "build", "--installer=uv", "--outdir", folder)
        for built in DIST.iterdir():
            if built.read_bytes() != (Path(again) / built.name).read_bytes():
                session.error(f"two builds of {built.name} differ")
    session.run("twine", "check", "--strict", *map(str, DIST.iterdir()))
    if lacking := files_of_the_package() - set(ZipFile(built_wheel()).namelist()):
        session.error(f"the wheel lacks {sorted(lacking)}")
    if relative := re.findall(r"\]\((?!https:).*?\)", description_of(built_wheel())):
        session.error(f"the long description has links to files beside it: {relative}")
    for extra in ("cupy12", "cupy13"):  # of no use without a GPU, but their versions must exist
        session.install("--dry-run", f"{built_wheel()}[{extra}]")


@nox.session(python=PYTHONS, requires=["wheel"])
@nox.parametrize("extra", list(EXTRAS), ids=list(EXTRAS))
def extras(session: nox.Session, extra: str) -> None:
    """Install the wheel with one extra, and run the examples that this serves, off the checkout."""
    page, *besides = EXTRAS[extra].split()
    install(session, f"{built_wheel()}[{extra}]", *besides, "core-test")
    with TemporaryDirectory() as folder, session.chdir(folder):
        for name in ("tests", "docs"):
            shutil.copytree(ROOT / name, name, ignore=shutil.ignore_patterns("_*"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, name)
        session.run("python", "-c", IS_INSTALLED)
        session.env["KERAS_BACKEND"] = "jax"
        session.run("python", "-m", "gcx")
        run_pytest(session, *OF_THE_PACKAGE, f"--packages={extra}", "--backends=numpy")
        run_pytest(session, "tests/examples/test_documents.py", "-k", f"python_block and {page}")


@nox.session(python=RUNNING)
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    install(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session(python=RUNNING)
def typing(session: nox.Session) -> None:
    """Check types: mypy on everything, pyright on what users of the package see."""
    install(session, "-e.", *FRAMEWORKS, "demo", "around-torch", "keras", "thinc", "typing")
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--verifytypes", "gcx", "--ignoreexternal")


@nox.session(python=RUNNING)
def docs(session: nox.Session) -> None:
    """Build the documentation, where each warning is an error."""
    build_docs(session, "docs")


@nox.session(python=RUNNING)
def site(session: nox.Session) -> None:
    """Build the documentation, and look at all pages in an installed Chromium."""
    build_docs(session, "site")
    packages = "--packages=playwright,chromium"
    run_pytest(session, "tests/test_canary.py", "tests/site", packages, "--backends=numpy")


@nox.session(python=PYTHONS)
def demo(session: nox.Session) -> None:
    """Train on real data in every framework, then compare the frameworks on random gradients."""
    install(session, "-e.", *FRAMEWORKS, "demo")
    run_tool(session, "demo", *session.posargs)
    run_tool(session, "agreement")
    run_tool(session, "agreement", "--bits")


@nox.session(python=RUNNING)
def fuzz(session: nox.Session) -> None:
    """Call gcx with random gradients, layouts, strides and options, 20,000 times."""
    install(session, "-e.", *FRAMEWORKS, "test")
    run_tool(session, "fuzz", *session.posargs)


@nox.session(python=RUNNING)
def mutants(session: nox.Session) -> None:
    """Change gcx in small ways, and see if a test fails; ``-- --only plan`` takes one module."""
    install(session, "-e.", *FRAMEWORKS, "peers", "around-torch", "keras", "thinc", "mutants")
    session.env["KERAS_BACKEND"] = "torch"
    run_tool(session, "mutants", *session.posargs)


@nox.session(python=RUNNING)
def bench(session: nox.Session) -> None:
    """Measure accuracy and speed on this machine's CPU, and write the table of the docs."""
    install(session, "-e.", *FRAMEWORKS, "peers")
    if "--brief" in session.posargs:
        session.env.update(IN_HASTE)
    run_tool(session, "cpu", *session.posargs)
    run_tool(session, "jax-axes")
    run_tool(session, "throughput", "--models", "resnet50", "--dtypes", "float32")


@nox.session(python=RUNNING)
def paper(session: nox.Session) -> None:
    """Train with GC and without on real data, and write the paper's tables with what came out."""
    install(session, "-e.", "paper")
    if "--brief" in session.posargs:
        session.env.update(IN_GREAT_HASTE)
    run_tool(session, "paper", *session.posargs)


@nox.session(python=RUNNING)
def paper_tests(session: nox.Session) -> None:
    """Run the tests of what `paper` runs."""
    install(session, "-e.", "paper", "core-test")
    session.env.update(IN_GREAT_HASTE)
    paths = ("tests/test_canary.py", "tests/paper")
    packages = "--packages=scipy,sklearn,matplotlib,tqdm"
    run_pytest(session, *paths, packages, "--backends=numpy,torch,jax", *IN_PARALLEL)


@nox.session(python=RUNNING)
def tool_tests(session: nox.Session) -> None:
    """Run the tests of the other tools, which `demo` and `bench` run."""
    install(session, "-e.", "tools")
    session.install("--no-deps", *TIMM)
    session.env["KERAS_BACKEND"] = "torch"
    paths = ("tests/test_canary.py", "tests/tools")
    packages = f"--packages={PEERS},keras,sklearn,transformers,timm_models,mutmut"
    run_pytest(session, *paths, packages, "--backends=numpy,torch,jax")


def install(session: nox.Session, *names: str) -> None:
    """Install dependency groups, and distributions (those that are not the name of a group)."""
    groups = PYPROJECT["dependency-groups"]
    wanted = [name for name in names if name not in groups]
    required = nox.project.dependency_groups(PYPROJECT, *(n for n in names if n in groups))
    session.install(*wanted, *required)


def build_docs(session: nox.Session, group: str) -> None:
    """Build the documentation anew, so that no page of an earlier build is left."""
    install(session, "-e.", *FRAMEWORKS, "around-torch", "keras", "thinc", group)
    session.env["KERAS_BACKEND"] = "torch"
    shutil.rmtree(ROOT / "docs" / "_build", ignore_errors=True)
    strictly = ("-W", "-n", "--keep-going", "-q", "-b", "html")
    session.run("sphinx-build", *strictly, "docs", "docs/_build/html")


def run_tool(session: nox.Session, *arguments: str) -> None:
    """Run one of the tools in benchmarks/."""
    session.run("python", "-m", "benchmarks", *arguments)


def run_pytest(session: nox.Session, *arguments: str) -> None:
    """Run pytest in the session's environment, with what follows ``--`` on nox's command line."""
    session.run("pytest", *arguments, *session.posargs)


def built_wheel() -> Path:
    """Find the wheel that the session of this name has built."""
    return next(DIST.glob("*.whl"))


def description_of(wheel: Path) -> str:
    """Read the long description, which follows the headers of the metadata."""
    with ZipFile(wheel) as files:
        (metadata,) = (name for name in files.namelist() if name.endswith("/METADATA"))
        return files.read(metadata).decode().partition("\n\n")[2]


def files_of_the_package() -> set[str]:
    """Find what a wheel must hold, by its paths there."""
    files = (path.relative_to(ROOT) for path in (ROOT / "gcx").rglob("*") if path.is_file())
    return {file.as_posix() for file in files if "__pycache__" not in file.parts}
