"""What connects seqfuse with other libraries, none of which it depends on."""

from seqfuse.interop.hf_models import export_hf

__all__ = ["export_hf"]
