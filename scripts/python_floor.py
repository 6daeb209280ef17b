"""Say in one line, and stop, when this Python is older than settings.ini allows (it must itself run on old Pythons)"""
import sys
from configparser import ConfigParser
from os.path import abspath, dirname, join

cfg = ConfigParser()
cfg.read(join(dirname(dirname(abspath(__file__))), "settings.ini"))
floor = cfg.get("DEFAULT", "python_floor")
if sys.version_info[:2] < tuple(int(n) for n in floor.split(".")):
    sys.exit("lps needs Python %s or newer and %s is %d.%d: name a newer one, as in `make test PYTHON=python%s`"
             % (floor, sys.executable, sys.version_info[0], sys.version_info[1], floor))
