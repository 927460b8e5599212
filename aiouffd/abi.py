"""Names and messages of the kernel's interface: see `aiouffd.kernel.abi`."""

from .kernel.abi import (
    CATEGORY_SINCE as CATEGORY_SINCE,
)
from .kernel.abi import (
    SINCE as SINCE,
)
from .kernel.abi import (
    Event as Event,
)
from .kernel.abi import (
    FaultFlag as FaultFlag,
)
from .kernel.abi import (
    Feature as Feature,
)
from .kernel.abi import (
    Fork as Fork,
)
from .kernel.abi import (
    Ioctl as Ioctl,
)
from .kernel.abi import (
    Message as Message,
)
from .kernel.abi import (
    Mode as Mode,
)
from .kernel.abi import (
    PageCategory as PageCategory,
)
from .kernel.abi import (
    PageFault as PageFault,
)
from .kernel.abi import (
    PageRegion as PageRegion,
)
from .kernel.abi import (
    Remap as Remap,
)
from .kernel.abi import (
    Remove as Remove,
)
from .kernel.abi import (
    Unmap as Unmap,
)

__all__ = [
    "CATEGORY_SINCE",
    "SINCE",
    "Event",
    "FaultFlag",
    "Feature",
    "Fork",
    "Ioctl",
    "Message",
    "Mode",
    "PageCategory",
    "PageFault",
    "PageRegion",
    "Remap",
    "Remove",
    "Unmap",
]
