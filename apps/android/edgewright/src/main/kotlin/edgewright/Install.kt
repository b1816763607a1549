package edgewright

import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.FlowCollector
import kotlinx.coroutines.flow.conflate
import kotlinx.coroutines.flow.emitAll
import kotlinx.coroutines.flow.flow
import kotlinx.coroutines.flow.flowOn
import java.io.File
import java.io.IOException
import java.io.InputStream

/** What an app ships: names, and the contents of one. */
interface Shipped {
    val names: Set<String>

    fun open(name: String): InputStream
}

/**
 * The model's files from what an app ships to a folder of its own, once, so that the runtime can map them; weights that are not
 * shipped are fetched. Each model has a folder inside `parent`; those of other models are deleted.
 */
class Installer(private val shipped: Shipped, private val parent: File) {
    private val contract = shipped.open(App.FILE).use { it.readBytes() }

    val folder = File(parent, sha256().apply { update(contract) }.hex().take(NAME))

    /** Throws EdgewrightException where something is damaged, cannot be fetched, or has no room; collect again to go on. */
    fun prepare(): Flow<Progress> = flow {
        parent.listFiles().orEmpty().filter { it != folder }.forEach { it.deleteRecursively() }
        if (!folder.isDirectory && !folder.mkdirs()) fail("$folder cannot be made; free some storage")
        File(folder, App.FILE).writeBytes(contract)
        copyAll(App.read(folder))
        if (Download.FILE in shipped.names) {
            val description = File(folder, Download.FILE)
            shipped.open(Download.FILE).use { from -> description.outputStream().use { from.copyTo(it) } }
            emitAll(Downloader(folder, Download.read(description)).fetch())
        }
    }.conflate().flowOn(Dispatchers.IO)

    /** Opens what was prepared. A file that is found damaged is deleted, so that `prepare` brings it again. */
    fun open(options: LoadOptions = LoadOptions()): Model = try {
        Model.open(folder, options)
    } catch (error: DamagedFileException) {
        error.file.delete()
        throw error
    }

    private suspend fun FlowCollector<Progress>.copyAll(app: App) {
        val facts = app.files.filterKeys { it in shipped.names }
        val missing = facts.filter { (name, fact) -> File(folder, name).length() != fact.bytes }
        val needed = missing.values.sumOf { it.bytes }
        if (needed >
            folder.usableSpace
        ) {
            fail("the model takes ${needed / MEGABYTE} MB more, ${folder.usableSpace / MEGABYTE} MB are free; free some")
        }
        var done = 0L
        for ((name, fact) in missing) {
            copy(name, fact) { emit(Progress(done + it, needed)) }
            done += fact.bytes
        }
        if (Traces.FILE in
            shipped.names
        ) {
            shipped.open(Traces.FILE).use { from -> File(folder, Traces.FILE).outputStream().use { from.copyTo(it) } }
        }
    }

    /** Under another name until it is whole: an app may be ended at any time. */
    private suspend fun copy(name: String, fact: FileFact, each: suspend (Long) -> Unit) {
        val partial = File(folder, "$name.copying")
        val digest = sha256()
        var size = 0L
        try {
            shipped.open(name).use { from ->
                partial.outputStream().use { to ->
                    readAll(from) { data, count ->
                        to.write(data, 0, count)
                        digest.update(data, 0, count)
                        size += count
                        each(size)
                    }
                }
            }
        } catch (error: IOException) {
            partial.delete()
            throw EdgewrightException("$name cannot be copied (${error.message}); free some storage, or install the app again", error)
        }
        if (size != fact.bytes || digest.hex() != fact.sha256) {
            partial.delete()
            fail("$name in the app's assets is damaged (its SHA-256 is not that of app.json); install the app again")
        }
        if (!partial.renameTo(File(folder, name))) fail("${File(folder, name)} cannot be written; look at the storage")
    }

    private companion object {
        const val NAME = 16
        const val MEGABYTE = 1_000_000L
    }
}
