// The project's JavaScript as `react-native bundle` makes it: node bundle.cjs android|ios FILE
const fs = require("node:fs");
const path = require("node:path");

const [platform, out] = process.argv.slice(2);
const packages = fs.realpathSync(path.join(__dirname, "node_modules"));
const from = (name) => require(require.resolve(name, { paths: [packages] }));

fs.writeFileSync(
  path.join(__dirname, "index.js"),
  'import { AppRegistry } from "react-native";\nimport App from "./App";\nAppRegistry.registerComponent("Reader", () => App);\n',
);
fs.writeFileSync(path.join(__dirname, "babel.config.js"), `module.exports = { presets: [require.resolve(${JSON.stringify(`${packages}/@react-native/babel-preset`)})] };\n`);

async function main() {
  const { getDefaultConfig, mergeConfig } = from("@react-native/metro-config");
  const metro = from("metro");
  const config = mergeConfig(getDefaultConfig(__dirname), {
    watchFolders: [__dirname, packages],
    resolver: { nodeModulesPaths: [packages], useWatchman: false },
    maxWorkers: 1,
    cacheStores: [],
    reporter: { update() {} },
  });
  await metro.runBuild(config, { entry: "index.js", platform, dev: false, minify: false, out });
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
