"""From scored samples to evidence: statistics, the results table and the report page."""
