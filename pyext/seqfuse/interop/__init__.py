"""What connects seqfuse with other libraries, none of which it depends on."""
