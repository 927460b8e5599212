"""Lazy restores of CRIU: what takes the place of ``criu lazy-pages``.

Layers, each importing only from those below it::

    server            a restore from beginning to end
    dialect           what the restorer says
    images            a set of images, wherever it is
    page_server       pages that a dump has left to a page server; its core has no I/O
    plan              which addresses come from where
    format, messages  what the files hold

Needs protobuf (the extra ``criu``).
"""

from __future__ import annotations

from .dialect import CriuDialect as CriuDialect
from .format import ImageError as ImageError
from .images import Dump as Dump
from .images import ImageSet as ImageSet
from .images import TaskImage as TaskImage
from .images import load as load
from .page_server import PageServer as PageServer
from .page_server import PageServerSource as PageServerSource
from .page_server_core import PageServerError as PageServerError
from .server import CriuServer as CriuServer
from .server import serve_images as serve_images

__all__ = [
    "CriuDialect",
    "CriuServer",
    "Dump",
    "ImageError",
    "ImageSet",
    "PageServer",
    "PageServerError",
    "PageServerSource",
    "TaskImage",
    "load",
    "serve_images",
]
