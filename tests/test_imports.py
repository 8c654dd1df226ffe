"""The package's modules: none imports itself by way of others, what an import loads, and the names that users know."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tqext

ROOT = Path(tqext.__file__).parent
# Compiled, or made by the build; they import nothing of the package.
LEAVES = {"tqext._ext", "tqext._build_info"}


def modules():
    """Every module's name and file."""
    out = {}
    for file in ROOT.rglob("*.py"):
        parts = ["tqext", *file.relative_to(ROOT).with_suffix("").parts]
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return {name: file for name, file in out.items() if not name.startswith("tqext.bench") and name not in LEAVES}


def imports(tree):
    """Modules and names that a file imports, also inside of functions; not what only the type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


def graph(files, source=lambda file: file.read_text()):
    """The modules that each module makes Python load: those it imports, and the packages they are in but it is not."""
    out = {}
    for name, file in files.items():
        found = set()
        for imported in imports(ast.parse(source(file))):
            parts = imported.split(".")
            if imported not in files and ".".join(parts[:-1]) in files and imported not in LEAVES:
                parts.pop()  # a name in a module
            if ".".join(parts) in files:
                found |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        own = {".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 2)}
        direct = {x for x in own if x != name and any(i == x for i in imports(ast.parse(source(file))))}
        out[name] = (found - own) | direct
    return out


def circle(edges):
    """A circle of modules, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        found = next((c for c in map(visit, sorted(edges[name])) if c), None)
        path.pop()
        done.add(name)
        return found

    return next((c for c in map(visit, sorted(edges)) if c), None)


def test_no_module_imports_itself_by_way_of_others():
    edges = graph(modules())
    assert len(edges) > 40 and sum(map(len, edges.values())) > 150
    assert circle(edges) is None


def test_tests_import_no_other_test():
    """What several test files need is in a module of its own: support.py, cache_support.py, tiny.py and others."""
    files = list(Path(__file__).parent.glob("*.py"))
    assert len(files) > 60
    for file in files:
        assert not [name for name in imports(ast.parse(file.read_text())) if name.startswith("test_")], file.name


@pytest.mark.parametrize(
    "line",
    [
        "from tqext.kv.batch import x",
        "def f():\n    import tqext.kv.batch",
        "from tqext.kv import batch",
        "import tqext.mlx_lm",
    ],
)
def test_the_circle_test_sees_one(line):
    """Also an import inside of a function, and one by way of a package's own imports."""
    files = modules()
    change = files["tqext.kv.schedule"]

    def source(file):
        return file.read_text() + (f"\n{line}\n" if file == change else "")

    if line == "import tqext.mlx_lm":  # whose __init__ imports nothing but on first use
        assert circle(graph(files, source)) is None
    else:
        assert "tqext.kv.schedule" in circle(graph(files, source))


def test_only_packages_whose_names_come_on_first_use_and_protocols_import_for_the_type_checker():
    for name, file in modules().items():
        if "TYPE_CHECKING" in file.read_text():
            package = name in ("tqext", "tqext.mlx_lm") and file.name == "__init__.py"
            assert package or name == "tqext.protocols", name


def loaded_by(code):
    """The modules of tqext, and the packages that take long to import, after some code in a new process."""
    slow = "('mlx_lm', 'numpy', 'transformers', 'huggingface_hub', 'safetensors')"
    show = f"import sys, json; print(json.dumps([sorted(m for m in sys.modules if m.split('.')[0] == 'tqext' or m in {slow})]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1])[0])


OPERATORS = {"tqext", "tqext._lazy", "tqext._load", "tqext._build_info", "tqext._ext", "tqext._ext.format", "tqext.ops"}


def test_import_loads_the_operators_and_nothing_else():
    assert loaded_by("import tqext; tqext.rotate") == OPERATORS


def test_commands_that_say_why_nothing_loads_import_only_the_standard_library():
    """`tqext --help` and `tqext doctor` run where MLX or the extension cannot be loaded."""
    code = "import sys; sys.argv[0] = 'tqext'; sys.modules['mlx.core'] = None; import tqext.commands.cli, tqext.commands.doctor"
    loaded = loaded_by(f"{code}; assert tqext.load_error is not None; import tqext.commands.metrics")
    commands = {f"tqext.commands{name}" for name in ("", ".cli", ".doctor", ".metrics", ".options", ".versions")}
    assert loaded == {"tqext", "tqext._lazy", "tqext._load", "tqext._build_info", "tqext.mlx_lm", "tqext.protocols", *commands}


def test_recipes_load_no_cache():
    assert loaded_by("import tqext; tqext.Recipe(); tqext.get_policy('tq33')") == {*OPERATORS, "tqext.presets"}


def test_caches_load_no_mlx_lm():
    loaded = loaded_by("import tqext; tqext.TurboQuantKVCache; tqext.BatchTurboQuantKVCache")
    kv = {name for name in modules() if name.startswith("tqext.kv")}
    assert loaded == {*OPERATORS, "tqext.presets", "numpy", *kv}


def test_hooks_load_no_calibration():
    assert not {"tqext.calibration", "tqext.blas", "tqext.mlx_lm.attaching"} & loaded_by(
        "import tqext.mlx_lm; tqext.mlx_lm.hook()"
    )


# What users import, and what stands in saved files: names are added here, never taken away.
PUBLIC = {
    "tqext": "PRESETS BatchTurboQuantKVCache BatchTurboQuantWindowKVCache PackedKeys PackedValues Policy PrefixStore Recipe "
    "TurboQuantKVCache TurboQuantLatentCache TurboQuantWindowKVCache __version__ latent_attention "
    "attach available_isas block_means calibrate dequantize detach format get_policy install isa load make_prompt_cache "
    "num_threads probe q1_dequantize q1_matmul q1_quantize quantize_keys quantize_values rotate shared_prefix_attention "
    "ternary_matmul turboquant_attention uninstall upgrade verify",
    "tqext.mlx_lm": "Layer MAX_HEAD_DIM PathError Report UPGRADE_CHUNK VERIFY_CODED attach calibrate detach hook install "
    "make_prompt_cache on_cache probe report stock_cache uninstall upgrade verify",
    "tqext.cache": "BLOCK GROWTH Exact STATE_MAGIC STATE_VERSION Snapshot TurboQuantKVCache",
    "tqext.batch": "BatchTurboQuantKVCache",
    "tqext.presets": "DEFAULT_PRESET PRESETS Policy Recipe get_policy",
    "tqext.models": "cache_dir fetch_package load local_folder resolve smollm2",
    "tqext.ops": "PackedKeys PackedValues dequantize latent_attention quantize_keys quantize_values rotate "
    "shared_prefix_attention "
    "turboquant_attention",
    "tqext.nn": "GROUP_SIZE Q1AllToShardedLinear Q1Embedding Q1Linear Q1ShardedToAllLinear Swap TernaryAllToShardedLinear "
    "TernaryEmbedding TernaryLinear TernaryShardedToAllLinear from_quantized insert_empty q1_paths quantize ternary_paths",
    "tqext.one_bit": "CONFIG_KEY check_native check_tensors hook one_bit_paths refuse_hadamard save unhook write_config",
    "tqext.gguf": "convert folder_of read unpack_blocks",
    "tqext.calibration": "Calibration LayerCalibration calibrate_layers",
    "tqext.by_position": "ByPosition Contender by_position contenders table",
    "tqext.agents": "Board KeptCache conversations tool_calls",
    "tqext.blas": "for_evaluation use_blas used",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay(module):
    found = importlib.import_module(module)
    for name in PUBLIC[module].split():
        assert getattr(found, name) is not None
    if module in ("tqext", "tqext.mlx_lm"):
        assert sorted(found.__all__) == sorted(PUBLIC[module].split())
        with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'no_such_name'"):
            _ = found.no_such_name


@pytest.mark.parametrize("name", ["TurboQuantKVCache", "BatchTurboQuantKVCache"])
def test_one_class_under_all_its_names(name):
    old = {"TurboQuantKVCache": "cache", "BatchTurboQuantKVCache": "batch"}[name]
    assert getattr(tqext, name) is getattr(importlib.import_module(f"tqext.{old}"), name)
    assert getattr(tqext, name).__name__ == name  # mlx-lm writes it into saved prompt caches


def asked_of(protocol):
    """The names in a protocol and in those that it is built on."""
    classes = [c for c in protocol.__mro__ if c.__module__ == "tqext.protocols"]
    names = {name for c in classes for name in [*vars(c), *vars(c).get("__annotations__", {})]}
    return {name for name in names if not name.startswith("_")} | ({"__call__"} & {n for c in classes for n in vars(c)})


def test_other_packages_and_our_caches_have_what_the_protocols_say():
    """mypy cannot tell: ``__getattr__`` of modules and of tokenizers has any name."""
    import mlx_lm.models.cache as stock
    from transformers import PreTrainedTokenizerFast

    import tiny
    from tqext import protocols

    group = stock.CacheList(stock.KVCache(), stock.ArraysCache(2))
    stocks = [stock.KVCache(), stock.RotatingKVCache(8), stock.BatchKVCache([0]), *group.caches, group]
    single = [tqext.TurboQuantKVCache(), tqext.TurboQuantWindowKVCache(512), tqext.TurboQuantLatentCache()]
    batches = [tqext.BatchTurboQuantKVCache([0]), tqext.BatchTurboQuantWindowKVCache([0], 512)]
    expected = {
        protocols.SizedCache: [*stocks, *single, *batches],
        protocols.CacheGroup: [group],
        protocols.CompressedCache: [*single, *batches],
        protocols.CompressedSequence: single,
        protocols.Model: [tiny.make_llama()],
        protocols.Tokenizer: [PreTrainedTokenizerFast],
        protocols.SavedTokenizer: [PreTrainedTokenizerFast],
    }
    for protocol, found in expected.items():
        assert len(asked_of(protocol)) >= 1
        for one in found:
            missing = {name for name in asked_of(protocol) if name not in {*dir(type(one)), *dir(one)}}
            assert not missing, (protocol.__name__, one, missing)
    assert asked_of(protocols.Model) == {"layers", "parameters", "modules", "named_modules", "__call__"}
