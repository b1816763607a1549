import COnnxRuntime
import Edgewright
import Foundation

/// ONNX Runtime on the CPU. threads: 0 is as many as there are cores.
public struct OnnxRuntime: Runtime {
  public let threads: Int

  public init(threads: Int = 0) {
    self.threads = threads
  }

  public func files(_ app: AppContract) -> [String: FileFact] {
    app.files
  }

  public func open(_ app: AppContract, in folder: URL, progress: LoadProgress) throws -> any GraphRunner {
    let api = try Api.shared.get()
    var sessions: [String: Session] = [:]
    for graph in app.graphs {
      progress(.opening(graph.name))
      sessions[graph.name] = try Session(
        api, folder.appendingPathComponent(graph.file), threads: threads, wanted: graph.onnxruntime)
    }
    return OnnxRunner(api, sessions)
  }
}

/// The C API, of the version that this was built with.
final class Api: @unchecked Sendable {
  static let shared = Result { try Api() }

  let version: String
  let table: UnsafePointer<OrtApi>
  private(set) var environment: OpaquePointer?

  private init() throws {
    guard let base = OrtGetApiBase() else { throw EdgewrightError("ONNX Runtime does not start; ship its library") }
    version = base.pointee.GetVersionString().map { String(cString: $0) } ?? "?"
    guard let table = base.pointee.GetApi(UInt32(ORT_API_VERSION)) else {
      throw EdgewrightError(
        "ONNX Runtime \(version) is older than the headers this app was built with (1.\(ORT_API_VERSION)); ship a newer library")
    }
    self.table = table
    try check(table.pointee.CreateEnv(ORT_LOGGING_LEVEL_ERROR, "edgewright", &environment), "ONNX Runtime does not start")
  }

  /// Throws what a call says went wrong, in one line.
  func check(_ status: OpaquePointer?, _ what: @autoclosure () -> String) throws {
    guard let status else { return }
    let line = table.pointee.GetErrorMessage(status).map { String(cString: $0) } ?? ""
    table.pointee.ReleaseStatus(status)
    throw EdgewrightError("\(what()): \(line.replacingOccurrences(of: "\n", with: " ").prefix(300))")
  }
}

final class Session {
  let pointer: OpaquePointer
  private let api: Api

  init(_ api: Api, _ file: URL, threads: Int, wanted: String) throws {
    self.api = api
    var (options, made): (OpaquePointer?, OpaquePointer?) = (nil, nil)
    try api.check(api.table.pointee.CreateSessionOptions(&options), "ONNX Runtime")
    defer { api.table.pointee.ReleaseSessionOptions(options) }
    try api.check(api.table.pointee.SetIntraOpNumThreads(options, Int32(clamping: threads)), "threads")
    try api.check(api.table.pointee.SetInterOpNumThreads(options, 1), "threads")
    try api.check(
      api.table.pointee.SetSessionLogSeverityLevel(options, Int32(ORT_LOGGING_LEVEL_FATAL.rawValue)), "ONNX Runtime")
    let fault = "\(file.path) does not open in ONNX Runtime \(api.version) (it needs \(wanted))"
    try api.check(api.table.pointee.CreateSession(api.environment, file.path, options, &made), fault)
    guard let made else { throw EdgewrightError(fault) }
    pointer = made
  }

  deinit {
    api.table.pointee.ReleaseSession(pointer)
  }
}

/// A value over the memory of a tensor, which it keeps.
final class Value {
  let pointer: OpaquePointer
  let tensor: Tensor
  private let api: Api

  init(_ api: Api, _ tensor: Tensor) throws {
    var (place, made): (OpaquePointer?, OpaquePointer?) = (nil, nil)
    try api.check(api.table.pointee.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &place), "memory")
    defer { api.table.pointee.ReleaseMemoryInfo(place) }
    let shape = tensor.shape.map(Int64.init)
    let bytes = tensor.count * tensor.type.bytes
    try api.check(
      api.table.pointee.CreateTensorWithDataAsOrtValue(
        place, tensor.data, bytes, shape, shape.count, Value.type(tensor.type), &made), "a tensor")
    guard let made else { throw EdgewrightError("ONNX Runtime made no tensor") }
    (self.api, self.tensor, pointer) = (api, tensor, made)
  }

  deinit {
    api.table.pointee.ReleaseValue(pointer)
  }

  /// A value that the runtime made, as a tensor that keeps it.
  static func taken(_ api: Api, _ pointer: OpaquePointer) throws -> Tensor {
    var (info, rank, data): (OpaquePointer?, Int, UnsafeMutableRawPointer?) = (nil, 0, nil)
    var element = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED
    do {
      try api.check(api.table.pointee.GetTensorTypeAndShape(pointer, &info), "a tensor")
      defer { api.table.pointee.ReleaseTensorTypeAndShapeInfo(info) }
      try api.check(api.table.pointee.GetTensorElementType(info, &element), "a tensor")
      try api.check(api.table.pointee.GetDimensionsCount(info, &rank), "a tensor")
      var shape = [Int64](repeating: 0, count: rank)
      try api.check(api.table.pointee.GetDimensions(info, &shape, rank), "a tensor")
      try api.check(api.table.pointee.GetTensorMutableData(pointer, &data), "a tensor")
      guard let data, let type = all.first(where: { Value.type($0) == element }) else {
        throw EdgewrightError("the model gives a tensor of a type that this client does not know; embed the bundle again")
      }
      return Tensor(type, shape.map { Int($0) }, data: data) { api.table.pointee.ReleaseValue(pointer) }
    } catch {
      api.table.pointee.ReleaseValue(pointer)
      throw error
    }
  }

  private static let all: [ElementType] = [.float32, .float16, .int64, .int32, .int8, .bool]

  private static func type(_ type: ElementType) -> ONNXTensorElementDataType {
    switch type {
    case .float32: ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
    case .float16: ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
    case .int64: ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
    case .int32: ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32
    case .int8: ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8
    case .bool: ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL
    }
  }
}
