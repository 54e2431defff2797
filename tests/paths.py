"""Directories that tests read: the checkout, the stored fixtures and, where it exists, the shared data."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
SHARED = ROOT.parent / "shared"
