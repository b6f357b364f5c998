"""Pages: what a run, a comparison, a judge and a policy's card show, drawn by the templates beside from records."""
