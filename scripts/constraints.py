"""Print the versions installed beside this Python as pip constraints, without the packages of one platform only"""
import platform
import re
import subprocess
import sys
from datetime import date

ONE_PLATFORM = r"(nvidia|cuda|triton|appnope|pywin|colorama)"

command = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
freeze = subprocess.run(command, check=True, capture_output=True, text=True).stdout
here = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
print(f"# The versions that `make test` passed with: {here}, {date.today()}.")
print("# `make` installs with them; settings.ini holds the lower bounds. `make constraints` writes this file anew.")
print(*[line for line in freeze.splitlines() if "==" in line and not re.match(ONE_PLATFORM, line)], sep="\n")
