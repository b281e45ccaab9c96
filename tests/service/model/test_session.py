"""Sessions: threads, trust, and memory that comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from service.model import session as sessions
from service.model.external_data import has_external_data
from service.model.session import ModelError, Session
from service.ops.cpus import available_cpus


def adder(weights: list[onnx.TensorProto], nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    """y = x + w."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])
    nodes = nodes or [helper.make_node("Add", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "adder", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def weight() -> onnx.TensorProto:
    return numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")


def external(tensor: onnx.TensorProto, location: str = "weights.bin") -> onnx.TensorProto:
    external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    return tensor


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "adder.onnx"
    path.write_bytes(adder([weight()]).SerializeToString())
    return path


def test_a_session_runs_and_knows_its_shapes(graph: Path) -> None:
    session = Session(graph)
    assert (session.inputs, session.outputs) == ({"x": (None, 4)}, {"y": (None, 4)})
    (y,) = session.run(["y"], {"x": np.ones((2, 4), np.float32)})
    np.testing.assert_array_equal(y, np.ones((2, 4)) + np.arange(4))


def test_threads_follow_the_affinity_and_never_spin(graph: Path) -> None:
    options = Session(graph)._session.get_session_options()
    assert options.intra_op_num_threads == available_cpus() <= len(os.sched_getaffinity(0))
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.get_session_config_entry("session.inter_op.allow_spinning") == "0"
    assert Session(graph, threads=3)._session.get_session_options().intra_op_num_threads == 3


def test_an_idle_session_uses_no_processor_time(graph: Path) -> None:
    code = """
        import sys, time
        import numpy as np
        from pathlib import Path
        from service.model.session import Session
        session = Session(Path(sys.argv[1]), threads=2)
        session.run(["y"], {"x": np.ones((2, 4), np.float32)})
        started = time.process_time()
        time.sleep(1.0)
        print(time.process_time() - started)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(graph)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.1


def test_links_are_refused(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "soft.onnx").symlink_to(graph)
    with pytest.raises(ModelError, match=r"soft\.onnx' is a link"):
        Session(tmp_path / "soft.onnx")
    os.link(graph, tmp_path / "hard.onnx")
    with pytest.raises(ModelError, match=r"hard\.onnx' is a link or no regular file \(2 names\)"):
        Session(tmp_path / "hard.onnx")


def test_external_data_is_refused_even_inside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    path = tmp_path / "adder.onnx"
    path.write_bytes(adder([external(weight())]).SerializeToString())
    assert ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])  # onnxruntime itself would follow it
    with pytest.raises(ModelError, match=r"adder\.onnx' keeps tensors in another file"):
        Session(path)


def nested_models() -> dict[str, onnx.ModelProto]:
    """External tensors in every place of a graph where onnx.proto allows a tensor."""
    secret = external(weight(), "../../etc/passwd")
    constant = helper.make_node("Constant", [], ["w"], value=secret)
    add = helper.make_node("Add", ["x", "w"], ["y"])
    inner = helper.make_graph([constant], "inner", [], [])
    branch = helper.make_node("If", ["c"], ["w"], then_branch=inner, else_branch=inner)
    model_with_function = adder([weight()])
    function = helper.make_function("local", "F", [], ["w"], [constant], [helper.make_opsetid("", 18)])
    model_with_function.functions.append(function)
    sparse = adder([weight()])
    sparse.graph.sparse_initializer.append(helper.make_sparse_tensor(secret, weight(), [4]))
    tensors = helper.make_node("Custom", [], ["w"])
    tensors.attribute.append(helper.make_attribute("many", [weight(), secret]))
    training = adder([weight()])
    training.training_info.add().initialization.CopyFrom(inner)
    return {
        "initializer": adder([secret]),
        "node": adder([], [constant, add]),
        "branch": adder([], [branch, add]),
        "function": model_with_function,
        "sparse": sparse,
        "attribute list": adder([], [tensors, add]),
        "training": training,
    }


@pytest.mark.parametrize("place", nested_models())
def test_external_data_is_found_wherever_a_tensor_may_stand(place: str) -> None:
    assert has_external_data(nested_models()[place].SerializeToString())


def test_external_data_does_not_hide_behind_bits_that_protobuf_drops() -> None:
    model = adder([external(weight())])
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    key = b"\xba\x80\x80\x80\x10"  # field 7, bytes, and bit 32, which protobuf's readers never see
    assert len(graph) < 2**14
    size = bytes([len(graph) & 127 | 128, len(graph) >> 7])
    hidden = model.SerializeToString() + key + size + graph
    with pytest.raises(ValueError, match="32 bits"):
        has_external_data(hidden)


def test_the_word_location_alone_is_no_external_data() -> None:
    model = adder([numpy_helper.from_array(np.frombuffer(b"location" * 2, np.float32).copy(), "w")])
    model.metadata_props.add(key="location", value="weights.bin")
    model.graph.doc_string = "location: weights.bin"
    assert not has_external_data(model.SerializeToString())


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_bytes_are_searched_without_a_crash(data: st.DataObject) -> None:
    content = adder([external(weight())]).SerializeToString()
    start = data.draw(st.integers(0, len(content) - 1))
    damaged = content[:start] + data.draw(st.binary(max_size=8)) + content[start + data.draw(st.integers(0, 8)) :]
    try:
        found = has_external_data(damaged)
    except ValueError:
        return
    assert found in (True, False)


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x00" * 100, b"location" + b"\xff" * 20])
def test_what_is_no_graph_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.onnx' is not"):
        Session(tmp_path / "bad.onnx")


def test_inputs_and_outputs_must_be_those_of_the_contract(graph: Path) -> None:
    session = Session(graph)
    session.require(["x"], ["y"])
    with pytest.raises(ModelError, match=r"has inputs \['x'\], expected \['input_ids'\]: export the model again"):
        session.require(["input_ids"], ["y"])
    with pytest.raises(ModelError, match=r"lacks \['vector'\]"):
        session.require(["x"], ["vector"])


def test_cuda_is_refused_where_it_is_not_offered(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ModelError, match=r"device 'cuda' is not offered .* install rhumbline\[gpu\]"):
        Session(graph, device="cuda")


@pytest.mark.parametrize(
    ("version", "fits"), [("1.24.4", False), ("0.99", False), ("1.25.0", True), ("2.0.0rc1", True)]
)
def test_versions_that_follow_paths_out_of_the_folder_are_refused(version: str, fits: bool) -> None:
    if fits:
        sessions._check_version(version)
    else:
        with pytest.raises(ModelError, match=f"onnxruntime {version} is too old, 1.25 is needed"):
            sessions._check_version(version)


def test_memory_of_a_large_batch_comes_back(tmp_path: Path) -> None:
    """The arena keeps the largest batch for good unless a run says otherwise."""
    w = numpy_helper.from_array(np.ones((64, 4096), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("ReduceSum", ["z"], ["y"], keepdims=0)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    graph = helper.make_graph(nodes, "wide", [x], [y], [w])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "wide.onnx").write_bytes(model.SerializeToString())
    code = """
        import resource, sys
        import numpy as np
        from pathlib import Path
        from service.model.session import Session
        session = Session(Path(sys.argv[1]), threads=1)
        session.run(["y"], {"x": np.ones((1, 64), np.float32)})
        page = resource.getpagesize()
        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * page
        before = resident()
        session.run(["y"], {"x": np.ones((16_000, 64), np.float32)}, shrink=sys.argv[2] == "shrink")
        print(resident() - before)
    """
    grown = {}
    for mode in ("keep", "shrink"):
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "wide.onnx"), mode]
        grown[mode] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown["keep"] > 200_000_000 > 50_000_000 > grown["shrink"]


@pytest.mark.parametrize(
    ("flags", "asked"),
    [({"sse4_1", "avx2"}, "1"), ({"sse4_1", "avx2", "avx_vnni"}, ""), ({"sse4_1", "avx512_vnni"}, ""), ({"asimd"}, "")],
)
def test_int8_is_exact_where_the_cpu_would_overflow(
    flags: set[str], asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_cpu_flags", lambda: frozenset(flags))
    options = sessions._options(1)
    if asked:
        assert options.get_session_config_entry("session.x64quantprecision") == asked
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("session.x64quantprecision")


def test_flags_are_those_of_this_machine() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        pytest.skip("no /proc/cpuinfo on this system")
    known = sessions._cpu_flags()
    lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")]
    assert known == frozenset(lines[0].split()[2:] if lines else ())
