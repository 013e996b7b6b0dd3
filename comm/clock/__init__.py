"""The clock: methods walk over a described step and a described network, in time that is computed, not spent."""
