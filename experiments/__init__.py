"""What measures: evaluation, baselines, tables, pages, costs. It may import anything; nothing imports it."""
