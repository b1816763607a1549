import Foundation

/// How far loading is: bytes hashed of all, then what takes its time at the first start.
public enum LoadStage: Equatable, Sendable {
  case checking(done: Int, of: Int)
  case compiling
  case opening(String)
}

public typealias LoadProgress = @Sendable (LoadStage) -> Void

/// What can run the graphs of an app: ONNX Runtime, Core ML, or one of your own.
public protocol Runtime: Sendable {
  /// The files that it reads: path in the app's folder -> what app.json says of it. They are checked before `open`.
  func files(_ app: AppContract) throws -> [String: FileFact]
  /// The app's graphs, ready to run.
  func open(_ app: AppContract, in folder: URL, progress: LoadProgress) throws -> any GraphRunner
}

/// Graphs that are open. It is used by one thread at a time.
public protocol GraphRunner: AnyObject {
  /// The runtime and its version.
  var name: String { get }
  /// Tokens that one call of the decoder takes at most.
  var mostTokens: Int { get }
  /// Runs a graph without states once; the outputs are new tensors.
  func run(_ graph: Graph, _ inputs: [String: Tensor]) throws -> [String: Tensor]
  /// A graph with states, all zero, for `capacity` positions. held: inputs, and states it only reads, that stay as they are.
  func calls(_ graph: Graph, capacity: Int, held: [String: Tensor]) throws -> any GraphCalls
}

/// A graph with states, called again and again.
public protocol GraphCalls: AnyObject {
  /// inputs: those that change. outputs: tensors that are written.
  func run(_ inputs: [String: Tensor], into outputs: [String: Tensor]) throws
}
