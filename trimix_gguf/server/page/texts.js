// The words of the page, by language: a file each in texts/.
const TEXTS = {};
