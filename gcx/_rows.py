from gcx._decisions import decide as row  # noqa: F401
from gcx._decisions import merge as tied  # noqa: F401
