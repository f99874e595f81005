"""FFmpeg's filters over frames of one kind."""

from typing import Any

import av


def graph_for(frame: Any, *filters: tuple[str, str]) -> Any:
    """A graph that takes frames such as this one, in order, and gives what the filters make of them.

    Args:
        filters: names and arguments.
    """
    graph = av.filter.Graph()
    source = graph.add("buffer", video_size=f"{frame.width}x{frame.height}", pix_fmt=frame.format.name,
                       time_base=str(frame.time_base), colorspace=str(frame.colorspace),
                       range=str(frame.color_range))  # fmt: skip
    graph.link_nodes(source, *(graph.add(*each) for each in filters), graph.add("buffersink")).configure()
    return graph
