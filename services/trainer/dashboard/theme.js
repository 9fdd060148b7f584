// @ts-check
// Before the first paint: the theme that was chosen here, or else the system's.
document.documentElement.dataset.theme = localStorage.getItem("tandem.theme") ?? "system";
