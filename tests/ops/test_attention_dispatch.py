"""Which backend runs branch_attention: pinned, measured or first; the file of choices; the calls into libraries."""

import json
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch
from ops.cases import assert_within_budget
from stg_kernels import branch_attention
from stg_kernels.attention import backends as libraries
from stg_kernels.attention import choices as kept
from stg_kernels.attention import dispatch, reference
from stg_kernels.attention.backends import Backend
from stg_kernels.attention.choices import Choice, Choices, kind_of
from stg_kernels.attention.parts import Part
from torch.nn.functional import scaled_dot_product_attention

Q = torch.randn(4, 8, 2, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def path(monkeypatch, tmp_path):
    """The file of a process that has chosen nothing yet."""
    path = tmp_path / "folder" / "attention.json"
    monkeypatch.setenv("STG_ATTENTION_CACHE", str(path))
    monkeypatch.delenv("STG_ATTENTION", raising=False)
    restart(monkeypatch)
    return path


def restart(monkeypatch):
    monkeypatch.setattr(dispatch, "choices", Choices())
    monkeypatch.setattr(dispatch, "_ran", {})


class Fakes:
    """Backends with given seconds; `ran` and `timed` are names, in order."""

    def __init__(self, monkeypatch):
        self.patch, self.all, self.ran, self.timed = monkeypatch.setattr, [], [], []
        self.patch(dispatch, "backends", lambda: tuple(self.all))
        self.patch(dispatch, "measure", self.measure)

    def add(self, name, seconds=1.0, run=reference.attention, why_not="", is_exact=True):
        def call(part):
            self.ran.append(name)
            return run(part)

        call.name, call.seconds = name, seconds
        self.all.append(
            Backend(name, lambda part: why_not if isinstance(why_not, str) else why_not(part), call, is_exact)
        )
        return self

    def measure(self, call, device):
        self.timed.append(call.func.name)
        return call.func.seconds

    def run(self, q=Q, *, tune=False, backend=None, **features):
        """Of one call, the backend whose result was returned."""
        with dispatch.tuning() if tune else nullcontext():
            branch_attention(q, q, q, backend=backend, **features)
        return self.ran[-1]


@pytest.fixture
def fakes(monkeypatch):
    return Fakes(monkeypatch)


@pytest.fixture
def three(fakes):
    return fakes.add("slow", 3.0).add("fast/a", 1.0).add("fast/b", 2.0)


def choice_of(q=Q):
    return dispatch.choices.get(kind_of(Part(q, q, q, 1.0)))


def raises(part):
    raise OSError("no kernel image\nand a long story")


def test_the_fastest_wins(three):
    assert three.run() == "slow"  # the first, while nothing is measured
    assert not three.timed
    assert three.run(tune=True) == "fast/a"
    assert choice_of() == Choice("fast/a", {"slow": 3.0, "fast/a": 1.0, "fast/b": 2.0}, {})
    assert three.run() == "fast/a"


def test_wrong_failing_unable_and_lossy_ones_are_never_chosen(fakes):
    fakes.add("off", 0.1, lambda part: reference.attention(part) * 1.01).add(
        "nan", 0.1, lambda part: part.q * torch.nan
    )
    fakes.add("raises", 0.1, raises).add("unable", 0.1, why_not="not today").add("lossy", 0.1, is_exact=False)
    fakes.add("good", 9.0).add("better", 8.0).add("torch", 0.1)
    assert fakes.run(tune=True) == "better"
    refused = choice_of().refused
    assert refused["off"].startswith("error ")
    assert "allowed" in refused["off"]
    assert refused["nan"].startswith("error nan")
    assert refused["raises"] == "OSError: no kernel image"
    assert refused["unable"] == "not today"
    assert set(refused) == {"off", "nan", "raises", "unable"}
    assert fakes.timed == ["good", "better"]


def test_one_that_is_left_needs_no_time(fakes):
    fakes.add("raises", run=raises).add("good").add("torch")
    assert fakes.run(tune=True) == "good"
    assert not fakes.timed


def test_nothing_is_kept_if_all_are_refused(three, path):
    assert three.run(torch.full_like(Q, torch.nan), tune=True) == "slow"
    assert not path.exists()
    assert three.run(tune=True) == "fast/a"


def test_once_per_kind(three):
    """Row counts and lengths up to the same power of two are one kind; heads, dtypes and features are others."""
    three.run(Q[:3, :5], tune=True)
    assert len(three.timed) == 3
    for rows in (1, 2, 3, 4):
        for tokens in (5, 7, 8):
            assert three.run(Q[:rows, :tokens], tune=True) == "fast/a"
    assert len(three.timed) == 3
    for q in (Q[:, :4], Q[:, :, :1], Q[..., :8], Q.half(), Q.repeat(1, 2, 1, 1)[:, :9]):
        three.run(q, tune=True)
    assert len(three.timed) == 3 * 6
    lengths = torch.full((4,), 3, dtype=torch.int32)
    three.run(Q, tune=True, key_lengths=lengths)
    three.run(Q, tune=True, key_lengths=lengths, kv_rows=[1, 0, 1, 2])
    assert len(three.timed) == 3 * 8
    assert len(dispatch.choices.all()) == 8


def test_tuning_ends_where_it_ends(three):
    with pytest.raises(ZeroDivisionError), dispatch.tuning(), dispatch.tuning():
        raise ZeroDivisionError
    three.run()
    assert not three.timed


def test_a_choice_outlives_the_process(three, monkeypatch):
    three.run(tune=True)
    restart(monkeypatch)
    assert three.run() == "fast/a"
    assert three.run(Q[:1, :5], tune=True) == "fast/a"
    assert len(three.timed) == 3
    dispatch.choices.forget()
    assert choice_of() == Choice("fast/a", {"slow": 3.0, "fast/a": 1.0, "fast/b": 2.0}, {})


def test_other_versions_choose_for_themselves(three, monkeypatch, path):
    three.run(tune=True)
    ours = kept._versions()
    monkeypatch.setattr(kept, "_versions", lambda: {**ours, "torch": "another"})
    restart(monkeypatch)
    assert three.run() == "slow"
    three.all.pop(1)
    assert three.run(tune=True) == "fast/b"
    assert [entry["backend"] for entry in json.loads(path.read_text())] == ["fast/a", "fast/b"]
    monkeypatch.setattr(kept, "_versions", lambda: ours)
    restart(monkeypatch)
    assert choice_of().backend == "fast/a"


def test_what_another_process_wrote_meanwhile_stays(three, path):
    three.run(tune=True)
    Choices().put(kind_of(Part(Q[:, :1], Q, Q, 1.0)), Choice("slow", {}, {}))
    three.run(Q.half(), tune=True)
    assert len(json.loads(path.read_text())) == 3


KIND = {"device": "cpu", "dtype": "float32", "heads": 2, "head_size": 16, "queries": 8, "keys": 8, "features": "dense"}
ENTRY = {"kind": KIND, "versions": {}, "backend": "slow", "seconds": {}, "refused": {}}
JUNK = ["", "no json", "[", "null", "5", "[1]", "[[]]", "[{}]", b"\xff\xfe\x00"]
JUNK += [json.dumps([ENTRY | {name: wrong}]) for name in ENTRY for wrong in (5, None, ["a"])]
JUNK += [json.dumps([ENTRY | {"kind": KIND | {"keys": [8]}}]), json.dumps([ENTRY | {"kind": KIND | {"rows": 1}}])]


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_a_file_that_is_none_is_written_anew(junk, three, path, monkeypatch):
    monkeypatch.setattr(kept, "_versions", dict)
    path.parent.mkdir()
    path.write_bytes(junk if isinstance(junk, bytes) else junk.encode())
    with pytest.warns(UserWarning, match="attention.json (cannot be read .* chosen without it|holds more than)"):
        assert three.run() == "slow"
    with pytest.warns(UserWarning, match=r"attention.json (cannot be read|holds more)"):
        assert three.run(tune=True) == "fast/a"
    assert [entry["backend"] for entry in json.loads(path.read_text())] == ["fast/a"]
    restart(monkeypatch)
    with warnings.catch_warnings(action="error"):
        assert three.run() == "fast/a"
    assert {file.name for file in path.parent.iterdir()} <= {"attention.json", "attention.json.lock"}


def test_entries_beside_one_that_is_not_understood_stay(three, path):
    three.run(tune=True)
    path.write_text(json.dumps([*json.loads(path.read_text()), {"kind": KIND | {"rows": 1}}]))
    dispatch.choices.forget()
    with pytest.warns(UserWarning, match="holds more than attention choices"):
        assert three.run() == "fast/a"


def test_processes_that_write_at_once_lose_nothing(path):
    kinds = [kind_of(Part(Q, Q, Q, 1.0))._replace(heads=heads) for heads in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda kind: Choices().put(kind, Choice("slow", {}, {})), kinds))
    assert len(json.loads(path.read_text())) == 40


def test_a_folder_in_place_of_the_file(three, path):
    (path / "inside").mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be (read|written)") as seen:
        assert three.run(tune=True) == "fast/a"
    assert str(seen[-1].message).endswith("attention will be measured again")
    assert three.run() == "fast/a"
    assert {file.name for file in path.parent.iterdir()} <= {"attention.json", "attention.json.lock"}


def test_a_folder_that_cannot_be_made(three, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STG_ATTENTION_CACHE", str(tmp_path / "file" / "attention.json"))
    with pytest.warns(UserWarning, match="cannot be (read|written)") as seen:
        assert three.run(tune=True) == "fast/a"
    assert "cannot be written" in str(seen[-1].message)
    assert three.run() == "fast/a"


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("STG_ATTENTION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept.file() == tmp_path / "stg_engine" / "attention.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kept.file().parts[-3:] == (".cache", "stg_engine", "attention.json")


def test_pins(three, monkeypatch):
    assert three.run(backend="fast") == "fast/a"
    assert three.run(backend="fast/b") == "fast/b"
    monkeypatch.setenv("STG_ATTENTION", "fast/b")
    assert three.run() == "fast/b"
    assert three.run(backend="slow", tune=True) == "slow"  # what is pinned is not measured
    assert not three.timed
    three.add("lossy", is_exact=False)
    assert three.run(backend="lossy") == "lossy"
    monkeypatch.setenv("STG_ATTENTION", "")
    assert three.run(tune=True) == "fast/a"


def test_the_first_of_several_that_can_is_taken(fakes):
    fakes.add("fast/a", why_not="too hot").add("fast/b").add("slow")
    assert fakes.run(backend="fast/a, slow,fast") == "slow"
    with pytest.raises(ValueError, match="backend 'none' is not allowed"):
        fakes.run(backend="slow,none")


def test_the_call_with_the_most_rows_decides(three):
    def measured(rows, **options):
        before = len(three.timed)
        with dispatch.tuning(**options):
            for count in rows:
                three.run(Q[:1].expand(count, -1, -1, -1))
        return (len(three.timed) - before) // len(three.all)

    assert measured([1, 2, 1, 3]) == 3
    assert measured([4]) == 0
    assert measured([1, 1], again=True) == 1


def test_a_family_takes_the_first_member_that_can(fakes):
    fakes.add("fast/a", why_not="too hot").add("fast/b")
    assert fakes.run(backend="fast") == "fast/b"
    with pytest.raises(RuntimeError, match=r"'fast/a' cannot run up to 8 x 8 tokens, .*, dense \(fast/a: too hot\)"):
        fakes.run(backend="fast/a")
    fakes.all[1] = Backend("fast/b", lambda part: "too cold", raises)
    with pytest.raises(RuntimeError, match="fast/a: too hot; fast/b: too cold"):
        fakes.run(backend="fast")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_name_that_is_none(three, dtype):
    with pytest.raises(ValueError, match=r"backend 'fas' is not allowed; choose from slow, fast, fast/a, fast/b$"):
        three.run(Q.to(dtype), backend="fas")


def test_names_of_the_real_ones(monkeypatch):
    monkeypatch.setenv("STG_ATTENTION", "flash")
    with pytest.raises(
        ValueError, match=r"sdpa/cudnn, .*flash-attn-4, flash-attn-3, .*xformers, xformers/flash3, .*torch"
    ):
        branch_attention(Q, Q, Q)
    for name in ("sdpa/flash", "sdpa/cudnn", "sdpa/efficient", "flash-attn-3", "xformers", "sage"):
        with pytest.raises(RuntimeError, match=f"{name!r} cannot run .*{name}.*: .*(CUDA|cannot be imported)"):
            branch_attention(Q, Q, Q, backend=name)


def test_own_keys_run_whatever_library_is_pinned(fakes):
    fakes.add("library", why_not=lambda part: libraries.OWN_KEYS if part.own_k is not None else "")
    fakes.add("triton/1", why_not="no GPU").add("torch")
    fakes.run(backend="library", own_key_rows=[1, 2, 3], text=(0, 3))
    assert fakes.ran == ["library", "torch", "library"]


def test_a_chosen_one_that_is_gone_or_cannot(three):
    three.run(tune=True)
    why = ""
    three.all[1] = Backend("fast/a", lambda part: why, three.all[1].run)
    assert three.run() == "fast/a"
    why = "another alignment"
    assert three.run() == "slow"
    assert "measured" not in str(dispatch.used())
    del three.all[1]
    assert three.run() == "slow"


def test_used_names_what_ran(three):
    branch_attention(Q, Q, Q)
    (kind, name), *others = dispatch.used().items()
    assert (kind, name, others) == ("up to 8 x 8 tokens, 2 heads of 16, float32, dense", "slow", [])
    three.run(tune=True)
    assert [*dispatch.used().values()] == ["fast/a, measured"]
    three.run(backend="fast/b")
    assert [*dispatch.used().values()] == ["fast/b, pinned"]
    three.run(Q.half(), backend="slow")
    assert [*dispatch.used().values()] == ["fast/b, pinned", "slow, pinned"]


def test_tuning_for_real(monkeypatch, path):
    monkeypatch.setattr(dispatch, "REPEATS", 1)
    plain = branch_attention(Q, Q, Q, backend="torch")
    with dispatch.tuning():
        result = branch_attention(Q, Q, Q)
    choice = choice_of()
    assert choice.backend in choice.seconds or choice.backend == "sdpa"
    assert choice.backend.split("/")[0] in ("sdpa", "triton")
    assert "flash-attn-3" in choice.refused
    assert dispatch.used() == {str(kind_of(Part(Q, Q, Q, 1.0))): f"{choice.backend}, measured"}
    torch.testing.assert_close(result, plain)
    assert path.exists()


def dense(q, k, v, scale):
    """[B, S, N, D]"""
    assert q.shape[-2:] == k.shape[-2:] == (3, 16)
    assert k.shape == v.shape == (len(q), 7, 3, 16)
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


def flash(q, k, v, *, softmax_scale):
    return dense(q, k, v, softmax_scale)


def flash_with_lse(q, k, v, *, softmax_scale):
    return dense(q, k, v, softmax_scale), None


def xformers(q, k, v, *, scale, op):
    assert op in ("flash3", "flash", "cutlass")
    return dense(q, k, v, scale)


def sage(q, k, v, *, tensor_layout, sm_scale):
    assert tensor_layout == "NHD"
    return dense(q, k, v, sm_scale)


LIBRARIES = {
    "flash-attn-4": {"flash_attn.cute": {"flash_attn_func": flash_with_lse}},
    "flash-attn-3": {"flash_attn_interface": {"flash_attn_func": flash}},
    "flash-attn-2": {"flash_attn": {"flash_attn_func": flash}},
    "sage": {"sageattention": {"sageattn": sage}},
} | {
    f"xformers/{name}": {
        "xformers.ops": {"memory_efficient_attention_forward": xformers},
        f"xformers.ops.fmha.{name}": {"FwOp": name},
    }
    for name in ("flash3", "flash", "cutlass")
}


@pytest.fixture
def installed(monkeypatch):
    """Puts modules in place, or None for one that is not there; CPU tensors pass for CUDA's."""

    def install(modules):
        libraries._function.cache_clear()
        for name, members in modules.items():
            module = None if members is None else ModuleType(name)
            if members is not None:
                vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    yield install
    libraries._function.cache_clear()


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_call_of_a_library(name, installed):
    installed(LIBRARIES[name])
    q, (k, v) = torch.randn(3, 5, 3, 16).bfloat16(), torch.randn(2, 3, 7, 3, 16).bfloat16()
    for sources, kv_rows in ((3, None), (1, None), (3, [1, 1, 1]), (3, [2, 0, 0]), (2, [0, 1, 1])):
        call = (q, k[:sources], v[:sources], kv_rows)
        actual = branch_attention(*call[:3], kv_rows=kv_rows, scale=0.3, backend=name)
        assert f"{name}, pinned" in dispatch.used().values()
        exact = reference.branch_attention(*(x.double() for x in call[:3]), kv_rows, scale=0.3)
        low = branch_attention(*call[:3], kv_rows=kv_rows, scale=0.3, backend="sdpa")
        assert_within_budget(actual, low, exact)


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_a_library_refuses(name, installed):
    installed(LIBRARIES[name])
    why_not = next(backend.why_not for backend in libraries.LIBRARIES if backend.name == name)
    q = torch.ones(2, 8, 2, 16, dtype=torch.bfloat16)
    assert why_not(Part(q, q, q, 1.0)) == ""
    lengths = torch.ones(2, dtype=torch.int32)
    assert "no key lengths" in why_not(Part(q, q, q, 1.0, key_lengths=lengths))
    assert why_not(Part(q, q, q, 1.0, own_k=q, own_v=q)) == libraries.OWN_KEYS
    assert "not torch.float32" in why_not(Part(*3 * [q.float()], 1.0))
    for size in (12, 264):
        assert f"not {size}" in why_not(Part(*3 * [q.new_ones(2, 8, 2, size)], 1.0))
    installed(dict.fromkeys(LIBRARIES[name]))
    assert "cannot be imported" in why_not(Part(q, q, q, 1.0))
    installed({module: {} for module in LIBRARIES[name]})
    assert "cannot be imported" in why_not(Part(q, q, q, 1.0))


class Elsewhere(torch.Tensor):
    """A CPU tensor that says it is on another device."""

    device = property(lambda self: SimpleNamespace(type="cuda"))


@pytest.mark.parametrize("kv_rows", [None, (2, 0, 1), (0, 0, 0)], ids=str)
def test_sdpa_with_a_mask(kv_rows):
    """Where a length is not at hand: the mask that SDPA gets on a GPU."""
    rows = 1 if kv_rows == (0, 0, 0) else 3
    q, (k, v) = torch.randn(3, 5, 2, 16), torch.randn(2, rows, 7, 2, 16)
    lengths = torch.tensor([4, 0, 9][:rows], dtype=torch.int32)
    low = reference.attention(Part(q, k, v, 0.3, kv_rows, lengths))
    exact = reference.attention(Part(q.double(), k.double(), v.double(), 0.3, kv_rows, lengths))
    k[0, 4:], v[0, 4:] = torch.nan, torch.inf
    actual = libraries._sdpa(Part(q.as_subclass(Elsewhere), k, v, 0.3, kv_rows, lengths))
    assert_within_budget(actual.as_subclass(torch.Tensor), low, exact)
