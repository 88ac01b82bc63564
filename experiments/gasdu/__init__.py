"""Tables and figures of GASDU."""
