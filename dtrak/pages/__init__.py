"""What people look at: reports, plots and tables."""
