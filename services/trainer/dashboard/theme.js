// Runs before the first paint: sets the theme that was chosen in this browser, or the system's.
document.documentElement.dataset.theme = localStorage.getItem("tandem.theme") ?? "system";
