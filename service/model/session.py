"""The one place that makes onnxruntime sessions: threads, memory and trust are settled here.

Load sessions after the process is what it will be: forking once a session exists can hang (onnxruntime#9800).
"""

from __future__ import annotations

import re
import stat
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import onnxruntime as ort
from numpy.typing import NDArray

from service.model.external_data import has_external_data
from service.ops.cpus import available_cpus

Device = Literal["cpu", "cuda"]
OLDEST = (1, 25)  # earlier versions follow external-data paths out of the model folder
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ERRORS_ONLY = 3


class ModelError(Exception):
    """A graph cannot be trusted or run; the message names the file and the remedy."""


class Session:
    """An onnxruntime session over one self-contained graph.

    Attributes:
        path: the graph's file.
        inputs: shape of every input by name; free axes are None.
        outputs: shape of every output by name; free axes are None.
    """

    def __init__(self, path: Path, threads: int | None = None, device: Device = "cpu") -> None:
        _check_version(ort.__version__)
        _check_provider(device)
        if device == "cuda":
            ort.preload_dlls()  # CUDA and cuDNN may lie in wheels, where the loader does not look
        graph = _read_graph(path)
        try:
            self._session = ort.InferenceSession(graph, _options(threads), providers=_providers(device))
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            raise ModelError(f"'{path}' is not a graph that onnxruntime {ort.__version__} can run: {error}") from error
        if PROVIDERS[device] not in self._session.get_providers():  # onnxruntime falls back to the CPU without a word
            raise ModelError(f"device {device!r} cannot be used: check the driver, CUDA and cuDNN")
        self.path = path
        self.inputs = {node.name: _shape(node.shape) for node in self._session.get_inputs()}
        self.outputs = {node.name: _shape(node.shape) for node in self._session.get_outputs()}
        self._plain, self._shrink = ort.RunOptions(), ort.RunOptions()
        for run_options in (self._plain, self._shrink):
            run_options.only_execute_path_to_fetches = True  # nothing is computed for outputs that nobody asks for
        if device == "cpu":
            self._shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def require(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Raise ModelError unless the graph has exactly these inputs and at least these outputs."""
        if set(self.inputs) != set(inputs):
            raise ModelError(f"'{self.path}' has inputs {sorted(self.inputs)}, expected {sorted(inputs)}: {EXPORT}")
        if missing := sorted(set(outputs) - set(self.outputs)):
            raise ModelError(f"'{self.path}' has outputs {sorted(self.outputs)} and lacks {missing}: {EXPORT}")

    def run(
        self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]], shrink: bool = False
    ) -> list[NDArray[Any]]:
        """Run the graph.

        Args:
            outputs: names of the outputs to return, in this order.
            feeds: every input by name.
            shrink: whether the memory of this run goes back to the system; for large batches, which would
                otherwise keep it for good. (onnxruntime keeps what the very first run took: let it be a small one.)
        """
        results: list[NDArray[Any]] = self._session.run(
            list(outputs), dict(feeds), self._shrink if shrink else self._plain
        )
        return results


EXPORT = "export the model again"


def _read_graph(path: Path) -> bytes:
    """Return the bytes of a graph that is one plain file with all its data inside."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise ModelError(f"'{path}' is a link or no regular file ({status.st_nlink} names): copy the file in its place")
    graph = path.read_bytes()
    try:
        external = has_external_data(graph)
    except ValueError as error:
        raise ModelError(f"'{path}' is not an ONNX file ({error}): {EXPORT}") from None
    if external:
        raise ModelError(f"'{path}' keeps tensors in another file (external data): {EXPORT} as one file")
    return graph


def _options(threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cpus()
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    # spinning threads burn half a core while idle and do not answer faster
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if saturates(_cpu_flags()):
        options.add_session_config_entry("session.x64quantprecision", "1")  # slower, and right
    return options


def saturates(flags: Collection[str]) -> bool:
    """Whether a CPU adds two products of int8 in 16 bits, which overflow: x86 without VNNI, as far as its flags say."""
    return "sse4_1" in flags and not {"avx_vnni", "avx512_vnni"} & set(flags)


@cache
def _cpu_flags() -> frozenset[str]:
    """What Linux says that the CPU can do; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def _providers(device: Device) -> list[str]:
    return [PROVIDERS["cpu"]] if device == "cpu" else [PROVIDERS[device], PROVIDERS["cpu"]]


def _check_provider(device: Device) -> None:
    offered = ort.get_available_providers()
    if PROVIDERS[device] not in offered:
        raise ModelError(
            f"device {device!r} is not offered by this onnxruntime ({offered}): pip uninstall onnxruntime, "
            "then install rhumbline[gpu]"
        )


def _check_version(version: str) -> None:
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST:
        raise ModelError(f"onnxruntime {version} is too old, {'.'.join(map(str, OLDEST))} is needed: upgrade it")


def _shape(shape: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(axis if isinstance(axis, int) else None for axis in shape)
