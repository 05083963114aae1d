"""``report.html``: one static page about bundles. jinja2 and matplotlib; no network, no script."""
