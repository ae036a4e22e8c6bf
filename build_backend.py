"""How limbeck is built: wheels and source archives by scikit-build-core, editable installs as a plain path to src/.

scikit-build-core's own editable installs put a finder before all others, so that another checkout on PYTHONPATH could
no longer be imported. An editable install has no extension; `make kernels` builds it into src/.
"""

from hatchling.build import build_editable, get_requires_for_build_editable
from scikit_build_core.build import (
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]
