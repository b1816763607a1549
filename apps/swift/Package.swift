// swift-tools-version: 6.0
import Foundation
import PackageDescription

// On Apple platforms ONNX Runtime is onnxruntime.xcframework beside this file; elsewhere a library that the linker finds.
let runtime = "onnxruntime"
let framework = "\(runtime).xcframework"
let apple = FileManager.default.fileExists(atPath: "\(Context.packageDirectory)/\(framework)")

let package = Package(
  name: "Edgewright",
  platforms: [.iOS(.v17), .macOS(.v14)],
  products: [
    .library(name: "Edgewright", targets: ["Edgewright", "EdgewrightONNX", "EdgewrightCoreML", "EdgewrightUI"]),
    .executable(name: "edgewright-app", targets: ["edgewright-app"]),
  ],
  targets: [
    .target(
      name: "COnnxRuntime",
      dependencies: apple ? [.target(name: runtime)] : [],
      linkerSettings: apple
        ? [.linkedLibrary("c++"), .linkedFramework("CoreML"), .linkedFramework("Foundation")] : [.linkedLibrary(runtime)]
    ),
    .target(name: "Edgewright"),
    .target(name: "EdgewrightONNX", dependencies: ["Edgewright", "COnnxRuntime"]),
    .target(name: "EdgewrightCoreML", dependencies: ["Edgewright"]),
    .target(name: "EdgewrightUI", dependencies: ["Edgewright"]),
    .executableTarget(name: "edgewright-app", dependencies: ["Edgewright", "EdgewrightONNX", "EdgewrightCoreML"]),
    .testTarget(name: "EdgewrightTests", dependencies: ["Edgewright", "EdgewrightONNX", "EdgewrightUI"]),
  ] + (apple ? [.binaryTarget(name: runtime, path: framework)] : [])
)
