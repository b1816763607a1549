#if canImport(CoreML)
  import CoreML
  import Edgewright
  import Foundation

  /// Core ML with states: the app's package, a model for each of its functions.
  ///
  /// It is compiled for this device at the first start, which can take minutes, and kept among the app's caches.
  @available(macOS 15, iOS 18, *)
  public struct CoreMLRuntime: Runtime {
    public let units: MLComputeUnits

    public init(units: MLComputeUnits = .all) {
      self.units = units
    }

    public func files(_ app: AppContract) throws -> [String: FileFact] {
      try CoreMLRuntime.package(app).files
    }

    public func open(_ app: AppContract, in folder: URL, progress: LoadProgress) throws -> any GraphRunner {
      let facts = try CoreMLRuntime.package(app)
      let compiled = try CoreMLRuntime.compiled(folder.appendingPathComponent(facts.package), app.fingerprint, progress)
      var models: [String: MLModel] = [:]
      for function in facts.functions {
        progress(.opening(function))
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        configuration.functionName = function
        models[function] = try told("\(facts.package) does not open") {
          try MLModel(contentsOf: compiled, configuration: configuration)
        }
      }
      return CoreMLRunner(app, models)
    }

    private static func package(_ app: AppContract) throws -> AppContract.CoreML {
      guard let package = app.coreml else {
        throw EdgewrightError("app.json has no Core ML package; export with --format onnx --format coreml, and embed again")
      }
      return package
    }

    /// The package as Core ML compiled it for this device. It is moved into the caches when it is whole.
    private static func compiled(_ package: URL, _ fingerprint: String, _ progress: LoadProgress) throws -> URL {
      let caches = try told("the caches cannot be found") {
        try FileManager.default.url(for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
      }
      let folder = caches.appendingPathComponent("edgewright", isDirectory: true)
      let kept = folder.appendingPathComponent("\(fingerprint.prefix(32)).mlmodelc", isDirectory: true)
      if FileManager.default.fileExists(atPath: kept.path) { return kept }
      progress(.compiling)
      let made = try told("\(package.lastPathComponent) does not compile") { try MLModel.compileModel(at: package) }
      try told("the compiled model cannot be kept; look at the disk") {
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        try FileManager.default.moveItem(at: made, to: kept)
      }
      return kept
    }
  }

  /// What a call throws, as one line.
  func told<Result>(_ what: String, _ body: () throws -> Result) throws -> Result {
    do {
      return try body()
    } catch let error as EdgewrightError {
      throw error
    } catch {
      throw EdgewrightError("\(what): \(error.localizedDescription.replacingOccurrences(of: "\n", with: " ").prefix(300))")
    }
  }
#endif
