"""Where golden's numbers are kept unless an option says otherwise, and how much of them.

Apart from `conformance.scale_cache`, which needs golden, for the options of the command line and of
the plugin: every session of pytest imports those.
"""

from __future__ import annotations

MEGABYTES = 2048
"""Size that the folder is kept below, unless told otherwise."""
FOLDER_VARIABLE = "ATTN_CONFORMANCE_CACHE"
"""Environment variable that names the folder where no option does."""
