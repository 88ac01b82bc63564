"""What every experiment is made of: settings, trials, tables, pictures, a report."""
