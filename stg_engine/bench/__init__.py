"""What a guided step costs, against everything that could be used instead: `stg-engine bench`, `stg-engine sweep`."""
