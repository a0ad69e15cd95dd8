// Search without a server. Browsers refuse workers to pages that are opened from a disk, so there the worker's script
// runs in a hidden frame, which is handed what a worker would be handed.
if (location.protocol === "file:") {
  const load = (page, url) =>
    new Promise((resolve, reject) => {
      const script = page.document.createElement("script");
      Object.assign(script, { src: url, onload: resolve, onerror: reject });
      page.document.body.append(script);
    });

  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = Object.assign(document.createElement("iframe"), { hidden: true });
      document.body.append(frame);
      const page = (this.page = frame.contentWindow);
      page.importScripts = (...urls) => urls.reduce((done, next) => done.then(() => load(page, next)), Promise.resolve());
      page.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.loaded = load(page, new URL(url, location.href).href);
    }

    postMessage(data) {
      this.loaded.then(() => this.page.dispatchEvent(new this.page.MessageEvent("message", { data })));
    }
  };
}
