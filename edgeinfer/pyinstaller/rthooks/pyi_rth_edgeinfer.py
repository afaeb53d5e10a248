"""Runs before a frozen program: lets it start itself as the process of one of our modules.

The names are those of edgeinfer.platform.children, which a program need not load to start.
"""

import sys

if sys.argv[1:3] == ["--edgeinfer-module", "edgeinfer.text.jinja_process"]:
    from edgeinfer.text.jinja_process import main

    main()
    sys.exit()
sys._edgeinfer_starts_itself = True  # type: ignore[attr-defined]
