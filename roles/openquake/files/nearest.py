"""Print which of the names after the first is most like it; nothing where none is."""

import difflib
import sys

print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], n=1))
