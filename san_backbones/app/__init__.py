"""A page in the browser that shows what a SAN does with a picture: attention, features, detections.

`san-backbones app` starts it. It needs Gradio: the extra 'app'. Uploads stay on the machine that runs it; nothing is
asked from the network, and nothing is shared unless that is asked for.
"""
from __future__ import annotations

import os
import pathlib
from typing import Any

__all__ = ['create', 'launch']


def _gradio() -> None:
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # read when gradio is imported
    try:
        import gradio  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the page needs gradio and matplotlib: pip install 'san-backbones[app]' ({error})") \
            from error


def create(
        model: str = 'san10_patchwise.distilled',
        weights: str | os.PathLike[str] | None = None,
        *,
        random: bool = False,
        config: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        size: int = 224,
) -> Any:
    """Makes the page, without starting it.

    Args:
        model: The network that is chosen first, by a name that timm knows. Others to choose are its counterpart of the
            other form, untrained where no weights are at hand, and the networks that ship.
        weights: A checkpoint for it, instead of the pretrained weights.
        random: Untrained weights.
        config: Config of a detector of MMDetection or a segmenter of MMSegmentation with a SAN, for a view of its own.
        checkpoint: Its weights.
        size: Shorter side to which pictures are scaled for the networks, at the beginning.

    Returns:
        A `gradio.Blocks`, for `launch`.

    Raises:
        ImportError: Gradio, matplotlib or OpenMMLab's packages are missing.
        ValueError: Of config and checkpoint only one is given, or the detector holds no SAN.
        RuntimeError: Weights are not available or do not fit; the message says what to do.
    """
    _gradio()
    if (config is None) != (checkpoint is None):
        raise ValueError('a detector or segmenter needs both its config and its checkpoint')
    from . import networks, page, predictions, views
    first = networks.given(model, None if weights is None else pathlib.Path(weights), random)
    choices = networks.choices(first, model)
    predictor = None
    if config is not None and checkpoint is not None:
        predictor = predictions.Predictor(config, checkpoint)
        choices.append(networks.of_predictor(predictor.model, str(config), str(checkpoint)))
    return page.build(views.Views(choices, predictor, (str(config), str(checkpoint))), size)


def launch(page: Any, *, host: str = '127.0.0.1', port: int | None = None, share: bool = False,
           **options: Any) -> tuple[Any, str, str | None]:
    """Starts a page.

    Args:
        page: Of `create`.
        host: The address that it listens on; '0.0.0.0' lets the local network in.
        port: None takes the first that is free, from 7860.
        share: Let Gradio relay it to a public address for as long as it runs.
        options: More for `gradio.Blocks.launch`, such as `prevent_thread_lock=True`.

    Returns:
        The server, its local address, and the public one or None.
    """
    from .page import CSS, THEME
    from .pictures import MEGABYTES
    return page.launch(**{**dict(
        server_name=host, server_port=port, share=share, max_file_size=f'{MEGABYTES}mb', theme=THEME, css=CSS,
        enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, footer_links=[]), **options})
