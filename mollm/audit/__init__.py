"""An audit: tries to bring forgotten answers back, and says how much of them came."""

from mollm.audit.findings import Finding
from mollm.audit.run import Audit, CurvePoint, audit

__all__ = ["Audit", "CurvePoint", "Finding", "audit"]
