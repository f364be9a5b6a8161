"""Which characters are Chinese: the CJK ideographs of Unicode with their extensions."""

import re

RANGES = r"\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"  # inside the brackets of a pattern
CHINESE = re.compile(f"[{RANGES}]")
