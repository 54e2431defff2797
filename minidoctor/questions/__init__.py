"""Questions from JSON lines and from the published files of CMB, CMExam and CMMLU."""
