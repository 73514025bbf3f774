"""What TensorBoard makes of a run's event files: its reader in Python, that for notebooks, its data server."""

import time
from pathlib import Path

from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.context import RequestContext
from tensorboard.data import provider, server_ingester
from tensorboard.util import grpc_util, tensor_util

EVERYTHING = {"scalars": 0, "tensors": 0, "histograms": 0, "compressedHistograms": 0, "images": 0, "audio": 0}
Curves = dict[str, list[tuple[int, float]]]
"""Step and value by tag."""


def events(run_dir: Path) -> plugin_event_accumulator.EventAccumulator:
    """As TensorBoard reads where it has no data server; everything is a tensor."""
    return plugin_event_accumulator.EventAccumulator(str(run_dir / "tensorboard"), EVERYTHING).Reload()


def curves(found: plugin_event_accumulator.EventAccumulator) -> Curves:
    """The scalars."""
    return {
        tag: [(event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in found.Tensors(tag)]
        for tag in found.PluginTagToContent("scalars")
    }


def texts(found: plugin_event_accumulator.EventAccumulator, tag: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found.Tensors(f"{tag}/text_summary")]


def notebook(run_dir: Path) -> event_accumulator.EventAccumulator:
    """The reader that people use in notebooks."""
    return event_accumulator.EventAccumulator(str(run_dir / "tensorboard"), EVERYTHING).Reload()


def scalars(run_dir: Path) -> Curves:
    """The scalars as that reader has them."""
    found = notebook(run_dir)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


class Server:
    """TensorBoard's own data server, which reads the files for the browser; it looks for more of them every second."""

    def __init__(self, run_dir: Path) -> None:
        self._server = server_ingester.SubprocessServerDataIngester(
            server_ingester.get_server_binary(),
            str(run_dir / "tensorboard"),
            reload_interval=1,
            channel_creds_type=grpc_util.ChannelCredsType.LOCAL,
            samples_per_plugin={"scalars": 0},  # all
        )
        self._server.start()

    def scalars(self) -> Curves:
        data = self._server.data_provider.read_scalars(
            RequestContext(),
            experiment_id="",
            plugin_name="scalars",
            downsample=100_000,
            run_tag_filter=provider.RunTagFilter(),
        )
        return {tag: [(point.step, point.value) for point in points] for tag, points in data.get(".", {}).items()}

    def wait_for(self, expected: Curves, seconds: float = 20.0) -> Curves:
        """The scalars, once they are those that are expected, or after so many seconds."""
        begun = time.monotonic()
        while (found := self.scalars()) != expected and time.monotonic() - begun < seconds:
            time.sleep(0.1)
        return found

    def close(self) -> None:
        self._server._stdin_handle.close()  # by which it knows that nobody needs it any more
