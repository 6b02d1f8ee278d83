"""The paper's Figures 1–4 and Tables 1–3, drawn anew."""
