"""Pages, plots and tables of every stage: the HTML report, the paper's tables, the workspace."""
