"""One module per backend: status(), why_not(call), describe(call), and `<op>_forward` / `<op>_backward`."""
